"""Packed rows against padded ones: tokens computed and seconds of a step, teacher's and student's passes and update.

    python benchmarks/packing.py [--sequences 128] [--max-tokens 8192] [--steps 5]

One process; prompts of uniformly drawn lengths (--skewed: log-uniform), completions of 24 tokens; the modular chain's
student and teacher.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from renio_megatron.cli.launch import become_single_rank
from renio_megatron.config import HeadConfig, LossConfig, ParallelConfig, TrainConfig, WeightingConfig
from renio_megatron.data.batching.collate import flat_completions
from renio_megatron.losses.sample_weights import sample_weights
from renio_megatron.megatron.model.build import build_model
from renio_megatron.megatron.runtime.initialize import start, stop
from renio_megatron.megatron.student.learner import MegatronLearner
from renio_megatron.megatron.teacher.shared_layout import SharedLayoutTeacher
from renio_megatron.megatron.teacher.weights import TeacherWeights
from renio_megatron.megatron.weights.hf import load_weights
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.shipped import model_directory
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.training.algorithms.weighted_loss import WeightedLoss
from renio_megatron.types import Prompt, Rollout

COMPLETION = 24


def rollouts_of(count: int, shortest: int, longest: int, vocab_size: int, *, is_skewed: bool) -> list[Rollout]:
    """Random prompts and completions; both extreme lengths are among them; skewed: log-uniform lengths."""
    draw = random.Random(0)
    if is_skewed:
        low, high = math.log(shortest), math.log(longest)
        drawn = [round(math.exp(draw.uniform(low, high))) for _ in range(count - 2)]
    else:
        drawn = [draw.randint(shortest, longest) for _ in range(count - 2)]
    lengths = [shortest, longest, *drawn]
    made = []
    for index, length in enumerate(lengths):
        ids = tuple(draw.randrange(vocab_size) for _ in range(length))
        made.append(Rollout(Prompt(index, ids, ids), tuple(draw.randrange(vocab_size) for _ in range(COMPLETION))))
    return made


def stepper(train: TrainConfig, layout: ParallelLayout, rollouts: list[Rollout]) -> Callable[[], int]:
    """A function that does one training step and returns the tokens that the student computes in a pass."""
    parallel, loss, head, weighting = ParallelConfig(), LossConfig(), HeadConfig(), WeightingConfig()
    parts = []
    for name in ("modchain/student", "modchain/teacher"):
        directory: Path = model_directory(name, "model")
        architecture = Architecture.from_directory(directory)
        part = build_model(architecture, layout, parallel, train, vocab_size=architecture.vocab_size)
        load_weights(part, directory)
        parts.append(part)
    learner = MegatronLearner(parts[0], train, parallel, temperature=1.0, pad_id=0)
    teacher = SharedLayoutTeacher(TeacherWeights(parts[1]), train, head, temperature=1.0, pad_id=0)
    _, owner, _ = flat_completions(rollouts)
    steps = itertools.count(1)

    def step() -> int:
        batches = learner.make_micro_batches(rollouts)
        scores = teacher.score(rollouts, batches)
        sample = sample_weights(learner.score(batches)["student_logp"], scores.logp, owner, len(rollouts), weighting)
        learner.update(batches, WeightedLoss(scores, sample, loss, head), step=next(steps), lr=1e-5)
        return sum(batch.token_ids.numel() for batch in batches)

    return step


def measure(ways: dict[str, TrainConfig], rollouts: list[Rollout], steps: int) -> dict[str, tuple[int, float]]:
    """(tokens that the student computes, median seconds of a step) of each way.

    The ways take turns step by step, so that a machine that grows slower is slower for all; the first round warms up.
    """
    layout = start(ParallelConfig(), seed=1)
    steppers = {name: stepper(train, layout, rollouts) for name, train in ways.items()}
    tokens: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(steps + 1):
        for name, step in steppers.items():
            begin = time.perf_counter()
            tokens[name] = step()
            times[name].append(time.perf_counter() - begin)
    stop()
    return {name: (tokens[name], statistics.median(times[name][1:])) for name in ways}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--shortest", type=int, default=10)
    parser.add_argument("--longest", type=int, default=400)
    parser.add_argument("--skewed", action="store_true", help="log-uniform lengths: most prompts are short")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    become_single_rank()
    rollouts = rollouts_of(
        options.sequences, options.shortest, options.longest, vocab_size=17, is_skewed=options.skewed
    )
    exist = sum(len(rollout.prompt.student_ids) + len(rollout.completion_ids) - 1 for rollout in rollouts)
    shared = {"global_batch_size": options.sequences, "clip_grad": 1.0}
    ways = {
        f"padded, {options.micro_batch_size} a micro-batch": TrainConfig(
            micro_batch_size=options.micro_batch_size, **shared
        ),
        f"packed, {options.max_tokens} tokens": TrainConfig(max_tokens_per_micro_batch=options.max_tokens, **shared),
    }
    print(f"{options.sequences} prompts of {options.shortest} to {options.longest} tokens: {exist} tokens exist")
    measured = measure(ways, rollouts, options.steps)
    padded = next(iter(measured.values()))[1]
    for name, (tokens, seconds) in measured.items():
        print(f"{name:28} {tokens:7} tokens (+{tokens / exist - 1:.1%})  {seconds:7.3f} s  {padded / seconds:.2f}x")


if __name__ == "__main__":
    main()
