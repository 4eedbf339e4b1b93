"""Steps of whole models with random weights: `benchmarks/step.py`, and the stages of `scripts/gpu_check.sh`."""
