"""Effect of FP8 and bf16 on the method."""
