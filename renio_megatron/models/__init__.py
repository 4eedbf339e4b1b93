"""Hugging Face model directories: config, tokenizer and weight files; no Megatron."""
