"""Graders of texts."""
