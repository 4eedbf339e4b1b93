"""The largest raw weight that ReNIO can give."""

from __future__ import annotations

import math

from renio_megatron.config.sections.weighting import RenioWeighting


def largest_weight(weighting: RenioWeighting) -> float:
    """The raw weight at the ceiling."""
    exponent = weighting.ceiling / weighting.temperature
    return math.exp(exponent) if exponent < 700.0 else math.inf
