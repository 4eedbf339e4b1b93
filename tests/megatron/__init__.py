"""What runs on Megatron."""
