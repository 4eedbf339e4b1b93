"""Tuning before the first step on ranks without a GPU: which cuts it asks for, and which the step asks for then.

What a GPU would do is played: tensors on the CPU go to `triton_ops` for the cuts that it asks for, its kernels do
nothing, and what it should have computed comes from `torch_ops`. The clock is fake and few entries are large.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from renio_megatron.config import HeadConfig, LossConfig, TeacherConfig
from renio_megatron.config.schema import JobConfig, SftConfig
from renio_megatron.losses import kernels
from renio_megatron.losses.kernels import torch_ops
from renio_megatron.training import targets
from tests.helpers.training_cases import VOCAB_SIZE, layout_of, recipe
from tests.megatron.route_cases import routed
from tests.megatron.teacher_layout_cases import own

CUDA = torch.device("cuda", 0)
LOSSES = {
    f"{name}, clip {clip}": LossConfig(beta=beta, entry_clip=clip, temperature=1.1)
    for name, beta in (("forward KL", 0.0), ("reverse KL", 1.0), ("JSD", 0.3))
    for clip in (None, 0.05)
}
BF16_LOGITS = HeadConfig(logits_dtype="bf16")


class Launches:
    """Stands for `triton_kernels`: every kernel can be launched on every grid, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


class Played:
    """Stands for `triton_ops`: asks for its cuts, computes by `torch_ops`."""

    def __getattr__(self, name: str) -> Any:
        from renio_megatron.losses.kernels import triton_ops

        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            getattr(triton_ops, name)(*args, **kwargs)
            return getattr(torch_ops, name)(*args, **kwargs)

        return call


class Asked:
    """What was asked for.

    Attributes:
        table: the tuned cuts, `tuning`'s own.
        large: keys of calls that would be timed, were they not in the table.
    """

    def __init__(self) -> None:
        self.table: dict[Any, Any] = {}
        self.large: set[Any] = set()


@contextlib.contextmanager
def played_gpu(least: int) -> Iterator[Asked]:
    """Calls of `least` entries are worth timing, which the pivotal tokens' one row must not have."""
    from renio_megatron.losses.kernels import triton_ops, tuning

    asked = Asked()
    choose = tuning.choose_launch

    def choose_launch(key: Any, rows: int, width: int, device: torch.device, trial: Any) -> Any:
        if rows * width >= least:
            asked.large.add((CUDA.index, key))
        choose(key, rows, width, CUDA, trial)
        return tuning.INTERPRETER_LAUNCH

    with contextlib.ExitStack() as stack:
        for place, name, value in (
            (tuning, "_fastest", asked.table),
            (tuning, "TRIAL_ENTRIES", least),
            (tuning, "_milliseconds", lambda run: float(run.args[0].block)),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (triton_ops, "choose_launch", choose_launch),
            (triton_ops, "jit", Launches()),
            (kernels, "_implementation", lambda arguments: Played()),
            (kernels, "tunes", lambda device: True),
            (targets, "MAX_PIVOTAL_TOKENS", 1),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        yield asked


def runs(folder: Path) -> dict[str, JobConfig]:
    """Name -> run, for 2 ranks."""
    base = recipe(folder)
    bf16 = {"train": replace(base.train, bf16=True)}
    scored = {"rollout": replace(base.rollout, student_scores="recompute")}
    tied = {"model": str(folder / "tied")}
    found: dict[str, Any] = {name: recipe(folder, loss=loss) for name, loss in LOSSES.items()}
    for name in ("forward KL, clip None", "JSD, clip 0.05"):
        found[f"bf16, {name}"] = recipe(folder, loss=LOSSES[name], **bf16, **tied)
        found[f"bf16, bf16 logits, {name}"] = recipe(folder, loss=LOSSES[name], head=BF16_LOGITS, **bf16)
    wide = TeacherConfig(model=str(folder / "teacher"), bf16=False)
    clipped = {"loss": LOSSES["reverse KL, clip 0.05"]}
    found |= {
        "bf16, bf16 logits, teacher fp32": recipe(folder, head=BF16_LOGITS, teacher=wide, **bf16),
        "chunks": recipe(folder, head=HeadConfig(chunk_size=3), **scored),
        "packed": recipe(folder, train=replace(base.train, max_tokens_per_micro_batch=40), **scored, **clipped),
        "TP2": recipe(folder, parallel=layout_of(2), **scored, **clipped, **tied),
        "PP2": recipe(folder, parallel=layout_of(1, 2), **scored, **clipped),
        "teacher TP2 of its own": recipe(folder, teacher=own(folder, 2), **scored),
        "routes": routed(folder),
    }
    found = {name: replace(config, canaries="off") for name, config in found.items()}  # they call kernels once a run
    for name, train in (("fine-tuning", base.train), ("bf16, fine-tuning", bf16["train"])):
        found[name] = SftConfig(
            model=base.model, data=base.data, parallel=base.parallel, train=train, output_dir=base.output_dir
        )
    return found


def tuned_and_asked(config: JobConfig, folder: Path, least: int) -> dict[str, Any]:
    """What a run asks for on this rank, where calls of `least` entries are large.

    Returns:
        The keys that were tuned when it was built, when that was repeated, those of its step's large calls and the
        table's after it, all as text; the lines about tuning; whether random numbers went on as if there had been none.
    """
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    layout, inputs, lines = start(config.parallel, seed=config.train.seed), read_inputs(config), list[str]()
    with played_gpu(least) as asked:
        trainer = build_trainer(config, inputs, layout, folder / "unused", report=lines.append)
        tuned, state = set(asked.table), torch.get_rng_state()
        asked.table.clear()
        trainer.algorithm.tune(12)
        unchanged, again = torch.equal(state, torch.get_rng_state()), set(asked.table)
        asked.large.clear()
        trainer.save_interval = 0
        trainer.run()
        trainer.algorithm.close()
        return {
            "tuned": {str(key) for key in tuned},
            "again": {str(key) for key in again},
            "asked": {str(key) for key in asked.large},
            "after": {str(key) for key in asked.table},
            "lines": [line for line in lines if line.startswith("tuned")],
            "random state is unchanged": unchanged,
            "has head": layout.pipeline.is_last,
        }


def run_all(folder: Path) -> dict[str, dict[str, Any]]:
    """`tuned_and_asked` of `runs`; two rows of the logits' narrowest shard are large."""
    return {
        name: tuned_and_asked(config, folder, 10 if "TP2" in name else VOCAB_SIZE + 1)
        for name, config in runs(folder).items()
    }
