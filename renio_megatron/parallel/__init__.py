"""Layouts, shards, and every collective of the math, on torch.distributed; no Megatron."""
