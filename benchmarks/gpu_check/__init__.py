"""What a machine with a GPU has to show, in stages: `scripts/gpu_check.sh`."""
