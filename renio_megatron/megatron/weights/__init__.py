"""Weights between files and Megatron's shards."""
