"""The Hugging Face side of a model: its description, tokenizer and files; no Megatron."""
