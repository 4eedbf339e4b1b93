"""Metrics of a run: their definitions, reductions, sinks, and the progress line."""
