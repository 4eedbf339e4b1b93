"""Normalization of raw weights by means that are already known. `parallel/reductions.py` computes means over ranks."""

from __future__ import annotations

import torch

from renio_megatron.errors import LayoutError


def divide_and_cap(raw_B: torch.Tensor, mean: torch.Tensor, cap: float | None) -> torch.Tensor:
    """raw / mean, bounded from above by `cap` (None: not bounded); where the mean is 0 the weights stay 0.

    Args:
        raw_B: raw weights [B].
        mean: mean raw weight, a scalar or [B] (one for each sequence's group).
        cap: largest weight; 10 in the release, reached only by batches of more than 52 sequences at c = 2.5.

    >>> divide_and_cap(torch.tensor([1.0, 3.0]), torch.tensor(2.0), cap=1.2).tolist()
    [0.5, 1.2000000476837158]
    """
    weights = raw_B / torch.where(mean == 0, 1.0, mean).to(raw_B.dtype)
    return weights if cap is None else weights.clamp(max=cap)


def moving_average(mean: torch.Tensor, state: torch.Tensor | None, decay: float) -> torch.Tensor:
    """The moving average of batch means including this batch, by which this batch is divided.

    Args:
        mean: this batch's mean raw weight, scalar.
        state: the average before this batch; None before the first batch, whose mean the average starts from.
        decay: share of the old average that is kept.

    Raises:
        LayoutError: a state that is not one number.

    >>> moving_average(torch.tensor(2.0), torch.tensor(4.0), decay=0.75).item()
    3.5
    """
    if state is None:
        return mean.clone()
    if state.numel() != 1:
        raise LayoutError(f"the state of a moving average is one number; got a tensor of shape {tuple(state.shape)}.")
    return decay * state.to(mean) + (1.0 - decay) * mean
