"""Ranks: what each one holds, and every collective of the mathematics. Knows torch.distributed, not Megatron."""
