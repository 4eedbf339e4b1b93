"""Errors caused by a precision, from log-probabilities to the gradient.

Two sets of scores of the same rollouts are compared, one of them as the reference. Independent of models and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from renio_megatron.errors import NumericsError
from renio_megatron.objective.statistics import rank_correlation

TINY = 1e-12


@dataclass(frozen=True)
class Scores:
    """Scores of the whole batch's rollouts by a student and a teacher.

    Attributes:
        student_logp, teacher_logp: log-probability of each sampled token, nats [N].
        divergence: of each token's distributions, as the loss sums it, nats [N].
        is_pivotal: bool [N].
        raw_weights, weights: of each sequence, before and after normalization [B].
    """

    student_logp: torch.Tensor
    teacher_logp: torch.Tensor
    divergence: torch.Tensor
    is_pivotal: torch.Tensor
    raw_weights: torch.Tensor
    weights: torch.Tensor

    def check(self, name: str) -> None:
        """Raises `NumericsError` where a number is not finite; `name` appears in the message."""
        for field in ("student_logp", "teacher_logp", "divergence", "weights"):
            if not bool(torch.isfinite(getattr(self, field)).all()):
                raise NumericsError(f"{name}: {field} holds NaN or infinity. There is nothing to compare.")


def score_errors(found: Scores, expected: Scores) -> dict[str, float]:
    """Every figure of `found` against `expected`, by name; relative ones are shares, absolute ones nats.

    - `student_logp/...`, `teacher_logp/...`: see `value_errors`.
    - `divergence/token_relative`: mean of the tokens' absolute errors over the mean divergence;
      `divergence/mean_relative`: error of the mean over the mean, with its sign.
    - `weight/relative_rms`, `weight/relative_max`: of the sequences' relative errors; `weight/rank_correlation`.
    - `pivotal/flipped`: tokens whose pivotal flag differs, of all tokens; `pivotal/lost`, `pivotal/gained`: of the
      tokens that are pivotal in `expected` (0 where none is).
    - `raw_weight/from_1`, `raw_weight/to_1`: sequences whose raw weight was 1 and is not, or the reverse, of all
      sequences.
    """
    errors: dict[str, float] = {}
    for name in ("student_logp", "teacher_logp"):
        spread = value_errors(getattr(found, name), getattr(expected, name))
        errors |= {f"{name}/{key}": value for key, value in spread.items()}
    mine, truth = found.divergence.double(), expected.divergence.double()
    mean = float(truth.mean())
    errors["divergence/token_relative"] = float((mine - truth).abs().mean()) / max(abs(mean), TINY)
    errors["divergence/mean_relative"] = float(mine.mean() - mean) / max(abs(mean), TINY)
    relative = (found.weights.double() / expected.weights.double() - 1).abs()
    errors["weight/relative_rms"] = float(relative.square().mean().sqrt())
    errors["weight/relative_max"] = float(relative.max())
    errors["weight/rank_correlation"] = rank_correlation(found.weights, expected.weights)
    errors |= verdict_errors(found.is_pivotal, expected.is_pivotal)
    was_1, is_1 = expected.raw_weights == 1, found.raw_weights == 1
    errors["raw_weight/from_1"] = float((was_1 & ~is_1).double().mean())
    errors["raw_weight/to_1"] = float((~was_1 & is_1).double().mean())
    return errors


def value_errors(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Absolute errors (RMS, 99th percentile, largest) and the same relative to each expected value [N].

    `relative_rms` is the RMS of the errors over that of the expected values; the other two are of the elements' own
    relative errors, which are large where an expected value is nearly 0.

    >>> errors = value_errors(torch.tensor([-1.0, -2.5]), torch.tensor([-1.0, -2.0]))
    >>> errors["absolute_max"], errors["relative_max"], round(errors["absolute_rms"], 4)
    (0.5, 0.25, 0.3536)
    """
    difference, size = (found.double() - expected.double()).abs(), expected.double().abs()
    relative = torch.where(difference > 0, difference / size.clamp(min=TINY), 0.0)
    return {
        "absolute_rms": float(difference.square().mean().sqrt()),
        "absolute_p99": float(difference.quantile(0.99)),
        "absolute_max": float(difference.max()),
        "relative_rms": float((difference.square().mean() / size.square().mean().clamp(min=TINY)).sqrt()),
        "relative_p99": float(relative.quantile(0.99)),
        "relative_max": float(relative.max()),
    }


def verdict_errors(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Shares of tokens whose pivotal flag differs; both bool [N].

    >>> verdict_errors(torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False]))
    {'pivotal/flipped': 0.5, 'pivotal/lost': 0.5, 'pivotal/gained': 0.5}
    """
    pivotal = max(int(expected.sum()), 1)
    return {
        "pivotal/flipped": float((found != expected).double().mean()),
        "pivotal/lost": int((expected & ~found).sum()) / pivotal,
        "pivotal/gained": int((found & ~expected).sum()) / pivotal,
    }


def gradient_sums(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """By parameter: sums of found x expected, found^2, expected^2, (found - expected)^2, which add up over shards.

    Args:
        found, expected: gradients, or shards of them, with the same names and shapes.
    """
    sums = {}
    for name, truth in expected.items():
        mine, truth = found[name].double().flatten(), truth.double().flatten()
        products = (mine @ truth, mine @ mine, truth @ truth, (mine - truth).square().sum())
        sums[name] = [float(value) for value in products]
    return sums


def gradient_errors(sums: Mapping[str, list[float]]) -> tuple[dict[str, float], dict[str, str]]:
    """Figures of the whole gradient and of the worst parameter, and the names of the worst parameters.

    `gradient/cosine`; `gradient/norm_relative`, the error of the norm with its sign; `gradient/relative`, the norm of
    the error over the norm; `gradient/worst_cosine` and `gradient/worst_relative`, of single parameters. Parameters
    whose gradient is 0 on both sides are left out.

    Args:
        sums: sums over whole parameters, see `gradient_sums`.

    >>> figures, names = gradient_errors({"a": [4.0, 4.0, 4.0, 0.0], "b": [0.0, 1.0, 1.0, 2.0]})
    >>> figures["gradient/cosine"], figures["gradient/worst_cosine"], names["gradient/worst_cosine"]
    (0.8, 0.0, 'b')
    """
    whole = [sum(column) for column in zip(*sums.values(), strict=True)]
    moving = {name: one for name, one in sums.items() if one[1] > 0 or one[2] > 0}
    if not moving:
        raise NumericsError("the gradient is exactly 0 on both sides. There is nothing to compare.")
    cosines = {name: _cosine(one) for name, one in moving.items()}
    relatives = {name: _relative(one) for name, one in moving.items()}
    worst = {
        "gradient/worst_cosine": min(cosines, key=cosines.__getitem__),
        "gradient/worst_relative": max(relatives, key=relatives.__getitem__),
    }
    return {
        "gradient/cosine": _cosine(whole),
        "gradient/norm_relative": (whole[1] / max(whole[2], TINY**2)) ** 0.5 - 1,
        "gradient/relative": _relative(whole),
        "gradient/worst_cosine": cosines[worst["gradient/worst_cosine"]],
        "gradient/worst_relative": relatives[worst["gradient/worst_relative"]],
    }, worst


def _cosine(sums: list[float]) -> float:
    product, mine, truth, _ = sums
    return product / max((mine * truth) ** 0.5, TINY**2)


def _relative(sums: list[float]) -> float:
    return (sums[3] / max(sums[2], TINY**2)) ** 0.5
