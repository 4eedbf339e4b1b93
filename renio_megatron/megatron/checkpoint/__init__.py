"""Checkpoints of a run: directory, content, saving and resuming."""
