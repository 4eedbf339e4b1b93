"""Messages about a run at its start and its end."""

from __future__ import annotations

import os
from typing import Any

from renio_megatron.config.schema import DistillationConfig, JobConfig
from renio_megatron.config.teachers import teacher_words


def finished_message(config: JobConfig) -> str:
    """The message about a run that is already complete."""
    return (
        f"{config.output_dir} is finished: all {config.train.train_iters} steps are done. "
        "Export it with `renio export`, continue it with a larger train.train_iters, or run it again with --fresh."
    )


def describe_run(config: JobConfig) -> str:
    """One line about a run: student, teachers, and numbers of ranks."""
    parallel, train = config.parallel, config.train
    layout = parallel.describe(_trainers(config))
    what = f"{config.model} on its solutions"
    if isinstance(config, DistillationConfig):
        weighting = " x ".join(part.name for part in config.weighting.parts)
        what = f"{config.model} learns from {_teachers(config)}, weighting {weighting}"
        if any(one.has_own_layout for one in config.teachers):
            layout = f"{layout}; teacher {teacher_words(parallel, config.teacher, _trainers(config))}"
    return f"{what}; {train.train_iters} steps of {train.global_batch_size} sequences; {layout}"


def _teachers(config: DistillationConfig) -> str:
    """The teachers, in words."""

    def words(teacher: Any) -> str:
        return teacher.model or f"itself ({teacher.kind}), shown more"

    routes = config.teacher.routes
    if not routes:
        return words(config.teacher)
    return f"{', '.join(f'{name}: {words(one)}' for name, one in routes.items())} (by {config.data.teacher_key})"


def _trainers(config: JobConfig) -> int:
    """Ranks of the student."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return world - config.num_teacher_ranks


def print_weights(config: JobConfig) -> None:
    """Prints which weighting is used, and over how many sequences its mean is taken; nothing in fine-tuning."""
    from renio_megatron.training.weights_line import weights_line, weights_price

    if isinstance(config, DistillationConfig):
        data_ranks = _trainers(config) // config.parallel.model_ranks
        print_rank_0(weights_line(config.weighting, config.train.global_batch_size, data_ranks))
        reads_again = config.teacher.payload_device == "recompute"
        if (price := weights_price(config.weighting, teacher_reads_again=reads_again)) is not None:
            print_rank_0(price)


def print_rank_0(text: str) -> None:
    """Prints on the first rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)
