"""From data sets to prompts, and from rollouts to the micro-batches that the model reads."""
