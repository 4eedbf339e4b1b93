"""Draws that are given up in real layouts: one rank hears of the request, and all leave."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from renio_megatron.config import ParallelConfig
from renio_megatron.parallel.stopping import Abandoned, StopRequest
from tests.helpers.training_cases import layout_of, recipe

PASSES = 5
LAYOUTS = {
    "TP2": layout_of(2),
    "PP2": layout_of(1, 2),
    "DP2": layout_of(),
    "CP2": ParallelConfig(context_parallel_size=2),
    "TP2 x PP2": layout_of(2, 2),
    "DP2 x TP2": layout_of(2),
    "EP2": ParallelConfig(expert_model_parallel_size=2),
}


def given_up(folder: Path, name: str, rank: int) -> dict[str, Any]:
    """What this rank saw of a step of at most 80 tokens a sequence, whose draws `rank` is asked to give up.

    It hears of the request in its fifth pass; passes take 20 ms. On `rank` the request is known at
    once, elsewhere when a thread has looked at the store.
    """
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    base = recipe(folder)
    model = {"model": str(folder / "mixtral"), "teacher": replace(base.teacher, model=str(folder / "mixtral"))}
    config = recipe(
        folder,
        parallel=LAYOUTS[name],
        # Rows that have ended have their own number of passes: no rank may wait for another's.
        rollout=replace(base.rollout, max_completion_length=80, micro_batch_size=2),
        **(model if name == "EP2" else {}),
    )
    layout = start(config.parallel, seed=7)
    stop = StopRequest()
    trainer = build_trainer(config, read_inputs(config), layout, folder / "unused", stop=stop)
    algorithm, passes = trainer.algorithm, 0
    sampler = algorithm.sampler
    forward = sampler._forward

    def slow_forward(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == PASSES and dist.get_rank() == rank:
            stop.note(15)
        time.sleep(0.02)
        return forward(*args)

    sampler._forward = slow_forward
    groups: list[int] = []
    algorithm.teacher.prefetch = lambda rollouts: groups.append(len(rollouts))
    before = [parameter.detach().clone() for _, parameter in algorithm.learner.part.named_parameters()]
    with stop.watched():
        try:
            algorithm.step(trainer.next_prompts(), 1)
            outcome = "done"
        except Abandoned:
            outcome = "abandoned"
    after = [parameter for _, parameter in algorithm.learner.part.named_parameters()]
    assert all((one == other).all() for one, other in zip(before, after, strict=True))
    found = {
        "outcome": outcome,
        "passes": passes,
        "groups": len(groups),
        "known": stop.agree(layout),
        "signal": stop.number,
    }
    algorithm.close()
    # The part draws on as if nothing had been: Megatron's settings are those of training again.
    sampler._forward, sampler._stop = forward, None
    found["again"] = len(algorithm.step(trainer.next_prompts(), 1)) > 0
    return found
