"""Graders and accuracy."""
