"""Losses over vocabulary-parallel logits and over hidden states."""
