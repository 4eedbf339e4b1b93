"""Prompts from data sets, and micro-batches from rollouts."""
