"""The loop, algorithms and metrics, on fakes."""
