"""Megatron's processes: start, groups, and what differs between versions and devices."""
