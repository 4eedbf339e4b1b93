"""Metrics of the whole batch's weights: mean, maximum, effective sample size, ReNIO's raw weights."""

from __future__ import annotations

import torch

from renio_megatron.config.sections.weighting import RenioWeighting


def weight_metrics(weights: torch.Tensor, is_capped: torch.Tensor) -> dict[str, float]:
    """Metrics of the weights of all sequences of a step, and of those that a strategy's cap bounds, [B] each.

    >>> weight_metrics(torch.tensor([0.5, 1.5]), torch.tensor([False, True]))
    {'weight/mean': 1.0, 'weight/max': 1.5, 'weight/ess_frac': 0.800000011920929, 'weight/cap_frac': 0.5}
    """
    return {
        "weight/mean": float(weights.mean()),
        "weight/max": float(weights.max()),
        "weight/ess_frac": float(weights.sum() ** 2 / (len(weights) * (weights**2).sum())) if weights.any() else 0.0,
        "weight/cap_frac": float(is_capped.double().mean()),
    }


def token_weight_metrics(sums: torch.Tensor, most: torch.Tensor) -> dict[str, float]:
    """Metrics of the weights of all tokens of a step.

    Args:
        sums: number, sum and sum of squares of the weights [3].
        most: the largest weight.

    >>> token_weight_metrics(torch.tensor([2.0, 2.0, 2.5]), torch.tensor(1.5))
    {'weight/token_mean': 1.0, 'weight/token_max': 1.5, 'weight/token_ess_frac': 0.800000011920929}
    """
    count, total, squares = sums
    return {
        "weight/token_mean": float(total / count),
        "weight/token_max": float(most),
        "weight/token_ess_frac": float(total**2 / (count * squares)) if squares > 0 else 0.0,
    }


def renio_metrics(raw: torch.Tensor, settings: RenioWeighting) -> dict[str, float]:
    """Metrics of ReNIO's raw weights of all sequences of a step [B].

    A weight counts as at the ceiling where its mean log ratio is within 1e-4 nats of it, to allow for rounding.

    >>> found = renio_metrics(torch.tensor([1.0, 3.0]), RenioWeighting())
    >>> found["renio/raw_weight_mean"], found["renio/unit_weight_frac"]
    (2.0, 0.5)
    """
    at_ceiling = (raw != 1) & (raw.log() * settings.temperature >= settings.ceiling - 1e-4)
    return {
        "renio/raw_weight_mean": float(raw.mean()),
        "renio/unit_weight_frac": float((raw == 1).double().mean()),
        "renio/ceiling_frac": float(at_ceiling.double().mean()),
    }
