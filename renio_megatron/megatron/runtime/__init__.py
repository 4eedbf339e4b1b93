"""Megatron runtime: initialization, process groups, compatibility with versions and devices."""
