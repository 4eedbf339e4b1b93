"""Weight loading and export: Hugging Face, PEFT and Megatron checkpoints."""
