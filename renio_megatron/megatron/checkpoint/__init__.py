"""Checkpoints of a run: their directory, what they hold, saving and resuming."""
