"""No micro-batch waits for the GPU: seen on the CPU, where a dispatch mode refuses what reads a tensor's value."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from renio_megatron.config import HeadConfig, LossConfig, ParallelConfig, WeightingConfig
from renio_megatron.config.schema import SftConfig
from renio_megatron.config.sections.report import RenioReportConfig
from tests.helpers.training_cases import layout_of, recipe, trainer_of
from tests.megatron.route_cases import MIXED, routed

ROOMS = ("/renio_megatron/losses/", "/renio_megatron/training/", "/renio_megatron/megatron/student/learner.py")
ONCE_A_STEP = ("_bad_gradient", "_finalize_gradients", "_require_finite_losses", "reduce_metrics", "_on_host", "update")
"""Functions that may read values: they run when the micro-batches are over."""
ON_THE_CPU = ("_drop_clamped_slopes_",)
"""Functions that read one where the device is a CPU, and take another way on a GPU."""
INNER = ("<genexpr>", "<listcomp>", "<lambda>", "<dictcomp>")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")


class Waited(AssertionError):
    """A tensor's value was read while a micro-batch was computed."""


class NoWaits(TorchDispatchMode):
    """Refuses what would wait for a GPU, where the innermost frame of the package is in one of `ROOMS`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        reads_mask = name == "index" and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if name in READS or reads_mask:
            self._refuse(name)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _refuse(name: str) -> None:
        frame: Any = sys._getframe(2)
        while frame is not None and (
            "/renio_megatron/" not in frame.f_code.co_filename or frame.f_code.co_name in INNER
        ):
            frame = frame.f_back
        if frame is None:
            return
        place = frame.f_code
        if any(room in place.co_filename for room in ROOMS) and place.co_name not in (*ONCE_A_STEP, *ON_THE_CPU):
            raise Waited(f"{name} in {place.co_name}, {Path(place.co_filename).name}:{frame.f_lineno}")


def _cases(folder: Path) -> dict[str, Any]:
    narrow = replace(recipe(folder).train, bf16=True)
    return {
        "forward KL, TP 2": recipe(folder, parallel=layout_of(2)),
        "JSD with a clip, chunks of 4, TP 2 + SP": recipe(
            folder,
            parallel=layout_of(2, sp=True),
            loss=LossConfig(beta=0.5, entry_clip=0.02, temperature=1.1),
            head=HeadConfig(chunk_size=4),
        ),
        "reverse KL, PP 2, host": recipe(
            folder,
            parallel=layout_of(1, 2),
            loss=LossConfig(beta=1.0, temperature=1.1),
            teacher=replace(recipe(folder).teacher, payload_device="host"),
        ),
        "entropies, TP 2": recipe(
            folder,
            parallel=layout_of(2),
            weighting=WeightingConfig(name="student_entropy"),
            also_report=(RenioReportConfig(),),
        ),
        "bf16, uniform, DP 2": recipe(folder, train=narrow, weighting=WeightingConfig(name="uniform")),
        "packed, CP 2": recipe(
            folder,
            parallel=ParallelConfig(context_parallel_size=2),
            train=replace(recipe(folder).train, max_tokens_per_micro_batch=50),
        ),
        "four teachers, TP 2": routed(folder, MIXED, parallel=layout_of(2)),
        "fine-tuning, TP 2": SftConfig(
            model=str(folder / "student"),
            data=recipe(folder).data,
            parallel=layout_of(2),
            train=recipe(folder).train,
            output_dir=str(folder / "sft"),
        ),
    }


def _update_of(config: Any, folder: Path) -> str:
    """What was refused in one update; empty where nothing was."""
    trainer = trainer_of(config, folder)
    learner = trainer.algorithm.learner  # type: ignore[attr-defined]
    update, seen = learner.update, []

    def watched(batches: Any, loss: Any, **given: Any) -> Any:
        assert len(batches) > 1 or config.train.max_tokens_per_micro_batch
        seen.append(len(batches))
        with NoWaits():
            return update(batches, loss, **given)

    learner.update = watched
    try:
        trainer.run()
    except Waited as error:
        return str(error)
    finally:
        trainer.algorithm.close()
    return "" if seen else "nothing was updated"


def _run_all(folder: Path) -> dict[str, str]:
    return {name: _update_of(config, folder) for name, config in _cases(folder).items()}


def _planted(folder: Path) -> dict[str, str]:
    """The same where a wait is planted in each of the rooms."""
    from renio_megatron.losses import chunked_loss
    from renio_megatron.megatron.student.learner import MegatronLearner
    from renio_megatron.training.algorithms.weighted_loss import WeightedLoss

    config, found = recipe(folder, parallel=layout_of(2)), {}
    places = {
        "losses": (chunked_loss.ChunkedLoss, "differentiate"),
        "algorithms": (WeightedLoss, "__call__"),
        "learner": (MegatronLearner, "_accumulate"),
    }
    for name, (owner, function) in places.items():
        real = getattr(owner, function)
        code = (
            "def planted(self, *args, **kwargs):\n"
            "    if float(torch.ones(())) and len(torch.ones(2).nonzero()) == 2:\n"
            "        return real(self, *args, **kwargs)\n"
        )
        space: dict[str, Any] = {"real": real, "torch": torch}
        exec(compile(code, sys.modules[owner.__module__].__file__ or "", "exec"), space)
        setattr(owner, function, space["planted"])
        try:
            found[name] = _update_of(config, folder)
        finally:
            setattr(owner, function, real)
    return found


def test_no_micro_batch_reads_a_value(two_ranks, models):
    for found in two_ranks(_run_all, models):
        assert found == dict.fromkeys(found, "")
        assert len(found) == 8


def test_a_planted_wait_is_seen(two_ranks, models):
    for found in two_ranks(_planted, models):
        assert found["losses"].startswith("_local_scalar_dense in planted, chunked_loss.py")
        assert found["algorithms"].startswith("_local_scalar_dense in planted, weighted_loss.py")
        assert found["learner"].startswith("_local_scalar_dense in planted, learner.py")
