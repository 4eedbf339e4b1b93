"""The training loop, the algorithms of one step, and the metrics of a run."""
