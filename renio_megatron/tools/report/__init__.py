"""What a person sees of finished runs: the table at the end, curves."""
