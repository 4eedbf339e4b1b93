"""Micro-batches from rollouts."""
