"""`train.deterministic_mode` meets no operation that torch refuses on a GPU: seen on the CPU by a dispatch mode.

On a GPU: tests/e2e/test_gpu_job.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from renio_megatron.config import WeightingConfig
from tests.helpers.training_cases import layout_of, recipe, trainer_of
from tests.megatron.route_cases import MIXED, routed

ALWAYS = ("put_", "histc", "nll_loss_forward", "nll_loss2d_forward", "_embedding_bag", "resize_")
OF_FLOATS = ("cumsum", "cumprod", "logcumsumexp")
"""Operations that torch.use_deterministic_algorithms lists as raising on a CUDA tensor; others of its list (pooling,
interpolation, padding of images) cannot occur here."""


class Refusals(TorchDispatchMode):
    """Notes what torch would refuse on a GPU, whoever calls it: a rank that stops would leave the others waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.refused = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        self.seen += 1
        is_float = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
        has_weights = name == "bincount" and len(args) > 1 and args[1] is not None
        returns_index = name in ("median", "nanmedian") and func._overloadname.startswith("dim")
        if name in ALWAYS or (name in OF_FLOATS and is_float) or has_weights or returns_index:
            self.refused.add(f"{name} in {_place()}")
        return func(*args, **(kwargs or {}))


def _place() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None and "/renio_megatron/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "a library" if frame is None else f"{frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}"


def _cases(folder: Path) -> dict[str, Any]:
    plain = recipe(folder)
    few = {"train": replace(plain.train, train_iters=1), "rollout": replace(plain.rollout, top_p=0.9)}
    return {
        "renio, top-p, TP 2": recipe(folder, parallel=layout_of(2), **few),
        "weights of tokens, DP 2": recipe(folder, weighting=WeightingConfig(name="student_entropy"), **few),
        "permuted, PP 2": recipe(
            folder, parallel=layout_of(1, 2), weighting=WeightingConfig(name="permuted", of=WeightingConfig()), **few
        ),
        "four teachers, TP 2": routed(folder, MIXED, parallel=layout_of(2), **few),
    }


def _refused(config: Any, folder: Path) -> set[str]:
    """What would be refused in a run's steps, drawing included."""
    trainer = trainer_of(config, folder)
    try:
        with Refusals() as noted:
            trainer.run()
    finally:
        trainer.algorithm.close()
    assert noted.seen > 500, "a step computes"
    return noted.refused


def _run_all(folder: Path) -> dict[str, Any]:
    """Every case with the sampler's sums as on a GPU; the first of them also with torch's scan."""
    from renio_megatron.megatron.student import sampler

    cases, before = _cases(folder), sampler._must_repeat
    sampler._must_repeat = lambda values: True
    try:
        found = {name: _refused(config, folder) for name, config in cases.items()}
    finally:
        sampler._must_repeat = before
    return found | {"torch's scan": _refused(next(iter(cases.values())), folder)}


def test_no_operation_of_a_step_is_refused(two_ranks, models):
    for found in two_ranks(_run_all, models):
        assert found.pop("torch's scan") == {"cumsum in cumulative, sampler.py"}, "what must be seen is seen"
        assert set().union(*found.values()) == set() and len(found) == 4
