"""The part of tests/fakes/te_standin.py that megatron-core's optimizer takes; like the real one, it needs CUDA."""

from __future__ import annotations

import torch


def _needs_cuda(*args, **kwargs):
    raise RuntimeError("Found no NVIDIA driver on your system.")


class FusedAdam(torch.optim.Optimizer):
    __init__ = _needs_cuda


class FusedSGD(torch.optim.Optimizer):
    __init__ = _needs_cuda


NAMES = {
    "FusedAdam": FusedAdam,
    "FusedSGD": FusedSGD,
    "multi_tensor_applier": lambda op, buffer, lists, *args: op(2048 * 32, buffer, lists, *args),
    **dict.fromkeys(("multi_tensor_l2norm", "multi_tensor_scale", "multi_tensor_scale_tensor"), _needs_cuda),
}
