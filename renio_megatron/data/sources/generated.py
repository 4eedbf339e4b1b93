"""Sources that generate their problems."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from renio_megatron.config import DataConfig
from renio_megatron.data.sources.source import EVAL_SEED_OFFSET, Source, order_of
from renio_megatron.errors import ConfigError
from renio_megatron.types import Record

DEFAULT_GYM_SIZE = 10_000


def modchain_source(config: DataConfig, split: str) -> Source:
    """The built-in task modchain: endless, with worked solutions and one-digit answers."""
    from renio_megatron.data.sources import modchain  # which brings torch

    def read(index: int) -> Record:
        problem = modchain.make_problem(config.seed, split, index)
        return Record(problem.prompt, problem.solution, problem.answer, where=f"modchain {split} problem {index}")

    return Source("modchain", read, grader="modchain", has_all_solutions=True)


def reasoning_gym_source(config: DataConfig, split: str) -> Source:
    """A generator of the reasoning-gym package: `data.size` problems, from another seed for evaluation."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ConfigError("data.source=reasoning_gym needs a package: pip install reasoning-gym.") from error
    if config.task not in DATASETS:
        near = ", ".join(difflib.get_close_matches(config.task or "", DATASETS, n=5, cutoff=0.4))
        raise ConfigError(
            f"data.task must name a task of reasoning_gym; got {config.task!r}. "
            + (f"Near: {near}." if near else "For example gsm_symbolic.")
        )
    size = config.size or DEFAULT_GYM_SIZE
    seed = config.seed + (EVAL_SEED_OFFSET if split == "eval" else 0)
    data = create_dataset(config.task, size=size, seed=seed)

    def read(index: int) -> Record:
        entry = data[index]
        metadata = entry["metadata"]
        where = f"{config.task} {split} problem {index}"
        answer = None if entry["answer"] is None else str(entry["answer"])
        return Record(entry["question"], metadata.get("answer_cot"), answer, metadata, where)

    def score(given: str, answer: str, metadata: Mapping[str, Any]) -> float:
        return float(data.score_answer(given, entry={"answer": answer, "metadata": metadata}))

    return Source("reasoning_gym", read, "reasoning_gym", size, order_of(config, split), score=score)
