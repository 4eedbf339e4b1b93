"""The losses and their kernels."""
