"""Models: construction of a rank's part, layers, adapters, FP8, experts and schedules."""
