"""Every sequence and token weighs 1: plain on-policy distillation."""

from __future__ import annotations

from renio_megatron.objective.weightings.strategy import Strategy


class Uniform(Strategy):
    """Nothing about the tokens matters."""
