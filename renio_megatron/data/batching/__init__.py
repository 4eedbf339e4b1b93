"""From rollouts to micro-batches."""
