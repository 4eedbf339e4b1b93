"""Uniform weights of 1: plain on-policy distillation."""

from __future__ import annotations

from renio_megatron.objective.weightings.strategy import Strategy


class Uniform(Strategy):
    """Weight 1 for every sequence and token."""
