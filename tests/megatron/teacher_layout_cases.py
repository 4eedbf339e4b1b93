"""A teacher in a layout of its own: one step through the trainer, beside the same step by transformers alone."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from renio_megatron.config import ParallelConfig, TeacherConfig, TeacherParallelConfig
from renio_megatron.config.schema import DistillationConfig
from tests.fakes.strategies import GateWeighting
from tests.helpers.scoring_ranks import answer, on_scoring_ranks
from tests.helpers.training_cases import layout_of, one_step, recipe

HIDDEN = 48
"""Of the teacher; the student's is 32."""
PREFIX = 4
"""Tokens of a completion of at most 6 that are learned from, in the cases of prefixes."""


def own(folder: Path, tp: int, pp: int = 1, *, sp: bool | None = None, **more: Any) -> TeacherConfig:
    """The larger teacher, cut into `tp` x `pp`; it has 2 groups of query heads."""
    parallel = TeacherParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sp
    )
    return TeacherConfig(model=str(folder / "teacher"), parallel=parallel, **more)


def colocated_cases(folder: Path) -> dict[str, DistillationConfig]:
    """Name -> run, for 4 ranks."""
    base = recipe(folder)
    both, packed = layout_of(2, 2), replace(base.train, max_tokens_per_micro_batch=40)
    cp = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2)
    vpp = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    host = {"payload_device": "host"}
    return {
        "student TP2 x PP2, teacher TP4": recipe(folder, parallel=both, teacher=own(folder, 4)),
        "student TP2 x PP2, teacher TP4 + SP, host": recipe(
            folder, parallel=both, teacher=own(folder, 4, sp=True, **host)
        ),
        "student TP2 x PP2 + SP, teacher PP2 x DP2": recipe(
            folder, parallel=layout_of(2, 2, sp=True), teacher=own(folder, 1, 2)
        ),
        "student TP2 x PP2, teacher DP4, tied": recipe(
            folder, parallel=both, teacher=own(folder, 1), model=str(folder / "tied")
        ),
        "student DP4 packed, teacher TP2 x PP2": recipe(folder, teacher=own(folder, 2, 2), train=packed),
        "student TP2 x CP2, teacher TP2 x DP2, packed": recipe(
            folder, parallel=cp, teacher=own(folder, 2), train=packed
        ),
        "student PP2 x VPP2 x DP2, teacher TP4": recipe(
            folder, parallel=vpp, teacher=own(folder, 4), model=str(folder / "deep")
        ),
        "student TP4, fewer groups than ranks": recipe(folder, parallel=layout_of(4)),
    }


def dedicated_cases(folder: Path) -> dict[str, DistillationConfig]:
    """Name -> run, for 4 ranks, of which 2 only score."""
    base = recipe(folder)
    tp, alone = layout_of(2), {"ranks": "dedicated"}
    packed = replace(base.train, max_tokens_per_micro_batch=40)
    return {
        "student TP2, teacher TP2 of its own": recipe(folder, parallel=tp, teacher=own(folder, 2, **alone)),
        "student TP2, teacher TP2 of its own, entropies weigh": recipe(
            folder, parallel=tp, teacher=own(folder, 2, **alone), weighting=GateWeighting(above=2.3)
        ),
        "student PP2, teacher PP2 of its own": recipe(
            folder, parallel=layout_of(1, 2), teacher=own(folder, 1, 2, **alone)
        ),
        "student DP2 packed, 2 copies of the teacher": recipe(
            folder, teacher=own(folder, 1, **alone, data_parallel_size=2), train=packed
        ),
        # Read while the others are drawn: 3 + 3 + 2 sequences, and 2 + 2 on each data rank, which exchange some.
        "student TP2, teacher TP2 of its own, in groups": recipe(
            folder, parallel=tp, teacher=own(folder, 2, **alone), rollout=replace(base.rollout, micro_batch_size=3)
        ),
        "student DP2 packed, 2 copies of the teacher, in groups": recipe(
            folder,
            teacher=own(folder, 1, **alone, data_parallel_size=2),
            train=packed,
            rollout=replace(base.rollout, micro_batch_size=2),
        ),
        "student CP2, teacher PP2 of its own, in groups": recipe(
            folder,
            parallel=ParallelConfig(context_parallel_size=2),
            teacher=own(folder, 1, 2, **alone),
            rollout=replace(base.rollout, micro_batch_size=2),
        ),
        # Of what is drawn, the teacher reads no token behind the prefix.
        "student TP2, teacher TP2 of its own, prefixes in groups": recipe(
            folder,
            parallel=tp,
            teacher=own(folder, 2, **alone),
            rollout=replace(base.rollout, micro_batch_size=3, prefix_length=PREFIX),
        ),
        "student DP2 packed, 2 copies of the teacher, prefixes in groups": recipe(
            folder,
            teacher=own(folder, 1, **alone, data_parallel_size=2),
            train=packed,
            rollout=replace(base.rollout, micro_batch_size=2, prefix_length=PREFIX),
        ),
    }


READS = (1, 1, 1, 1, 3, 2, 1, 3, 2)
"""Passes of the teacher in the cases of `dedicated_cases`; context-parallel ranks tell of all groups at once."""


def run_colocated(folder: Path, names: list[str]) -> dict[str, Any]:
    """Cases on this rank."""
    cases = colocated_cases(folder)
    return {name: one_step(cases[name], folder) for name in names}


def run_dedicated(folder: Path) -> dict[str, Any]:
    """Every case on this rank: half of the ranks train, half serve; these give the number of steps and of passes.

    Where sequences are drawn in groups, the second group is held up until the first one was read.
    """
    cases = dedicated_cases(folder)
    names = iter(cases)

    def train(config: DistillationConfig) -> dict[str, Any]:
        is_held_up = READS[list(cases).index(name := next(names))] > 1
        with _held_up_until(folder / f"read {name}") if is_held_up else contextlib.nullcontext():
            return one_step(config, folder)

    def serve(teachers: list[Any], _: Any) -> tuple[int, int]:
        (teacher,), name, passes = teachers, next(names), 0
        read = teacher._read

        def count(*args: Any) -> None:
            nonlocal passes
            read(*args)
            passes += 1
            (folder / f"read {name}").touch()

        teacher._read = count
        return answer(teachers), passes

    return on_scoring_ranks(cases, folder, train=train, serve=serve)


@contextlib.contextmanager
def _held_up_until(file: Path) -> Iterator[None]:
    """Every group of sequences but the first is drawn only when the file is there."""
    from renio_megatron.megatron.student.sampler import MegatronSampler

    decode, calls = MegatronSampler._decode, itertools.count()

    def wait_and_decode(*args: Any) -> Any:
        limit = time.monotonic() + 60.0
        is_first = next(calls) == 0
        while not is_first and not file.exists():
            assert time.monotonic() < limit, "nothing was read while the others were drawn"
            time.sleep(0.01)
        return decode(*args)

    MegatronSampler._decode = wait_and_decode  # type: ignore[method-assign]
    try:
        yield
    finally:
        MegatronSampler._decode = decode  # type: ignore[method-assign]
