"""Check that loaded weights are finite."""

from __future__ import annotations

import math

import torch

from renio_megatron.errors import ConfigError


def require_finite(values: torch.Tensor, what: str) -> None:
    """Raises `ConfigError`, whose message begins with `what`, where some value is NaN or inf.

    One pass, without a copy: NaN propagates to both minimum and maximum, an infinity is one of the two.
    """
    if values.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(values)):
        raise ConfigError(
            f"{what} holds NaN or inf. The file is damaged, or a run that diverged wrote it: take another copy."
        )
