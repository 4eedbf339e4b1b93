"""Canaries of real models: values in every layout, and faults that are planted in the parts of a step."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from renio_megatron.config import ParallelConfig, TeacherConfig
from renio_megatron.config.load import load_recipe
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.errors import RenioError
from renio_megatron.training.canaries import Canaries
from renio_megatron.types import Rollout
from tests.helpers.training_cases import layout_of, recipe, trainer_of
from tests.helpers.warned import messages_of

VALUES = {
    "TP2 + SP": {"parallel": layout_of(2, sp=True)},
    "PP2": {"parallel": layout_of(1, 2)},
    "CP2": {"parallel": ParallelConfig(context_parallel_size=2)},
    "DP2": {},
    "TP2, recomputed": {"parallel": layout_of(2), "teacher": {"payload_device": "recompute"}},
    "TP2, teacher in a layout of its own": {
        "parallel": layout_of(2),
        "teacher": {"parallel": {"tensor_model_parallel_size": 1}},
    },
}


def values_in(folder: Path, name: str) -> tuple[dict[str, Any], list[Rollout]]:
    """What canaries measure in a layout, on this rank, and the rollouts of all."""
    import torch.distributed as dist

    from renio_megatron.config import TeacherParallelConfig

    changes = dict(VALUES[name])
    teacher = dict(changes.pop("teacher", {}))
    if "parallel" in teacher:
        teacher["parallel"] = TeacherParallelConfig(**teacher["parallel"])
    config = recipe(folder, teacher=TeacherConfig(model=str(folder / "teacher"), **teacher), canaries="warn", **changes)
    config = replace(config, train=replace(config.train, micro_batch_size=8 if name != "DP2" else 4))
    trainer, seen = trainer_of(config, folder), {}
    algorithm = trainer.algorithm
    measure, look = Canaries.measure, algorithm._look_at_first

    def keep(self: Canaries, rollouts: Sequence[Rollout], *more: Any) -> Any:
        seen["rollouts"], seen["measured"] = list(rollouts), measure(self, rollouts, *more)
        return seen["measured"]

    Canaries.measure = keep  # type: ignore[method-assign]
    try:
        algorithm.look(trainer.next_prompts())
    finally:
        Canaries.measure = measure  # type: ignore[method-assign]
    assert look is not None
    algorithm.close()
    layout = algorithm.learner.part.layout
    shares: list[Any] = [None] * layout.data.size
    dist.all_gather_object(shares, seen["rollouts"], group=layout.data.group)
    return asdict(seen["measured"]), [rollout for share in shares for rollout in share]


def by_transformers(config: DistillationConfig, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The same values of one process, by transformers in fp64."""
    from transformers import AutoModelForCausalLM

    rows: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    for who, path in (("student", config.model), ("teacher", config.teacher.model)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for rollout in rollouts:
            prompt = rollout.prompt.student_ids if who == "student" else rollout.prompt.teacher_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + rollout.completion_ids])).logits[0]
            rows[who].append((logits[len(prompt) - 1 : -1] / config.loss.temperature).log_softmax(-1))
    student, teacher = torch.cat(rows["student"]), torch.cat(rows["teacher"])
    tokens = torch.tensor([token for rollout in rollouts for token in rollout.completion_ids])
    first = torch.tensor([place == 0 for rollout in rollouts for place in range(len(rollout.completion_ids))])
    logp, teacher_logp = (one.gather(1, tokens[:, None])[:, 0] for one in (student, teacher))

    def kl(teacher: torch.Tensor, student: torch.Tensor) -> float:
        return float((teacher.exp() * (teacher - student)).sum(-1).mean())

    return {
        "divergence": kl(teacher, student),
        "earlier": kl(teacher.roll(1, 0), student),
        "later": kl(teacher.roll(-1, 0), student),
        "first_student": float(logp[first].mean()),
        "first_teacher": float(teacher_logp[first].mean()),
        "rest": float((logp - teacher_logp)[~first].mean()),
        "tokens": len(tokens),
        "compared": len(tokens),
    }


# faults


def planted(folder: Path, name: str) -> tuple[str, list[str]]:
    """The error of a run of one step with a fault in it, or none, and its warnings; on this rank."""
    change, plant = FAULTS[name]
    trainer = trainer_of(modchain(folder, **change(folder)), folder)
    before = [parameter.detach().clone() for _, parameter in trainer.algorithm.learner.part.named_parameters()]
    with messages_of("renio_megatron.training.canaries") as told:
        try:
            with plant(trainer.algorithm):
                trainer.run()
        except RenioError as error:
            after = [parameter for _, parameter in trainer.algorithm.learner.part.named_parameters()]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "nothing was learned"
            return str(error), told
        finally:
            trainer.algorithm.close()
    return "", told


def modchain(folder: Path, **changes: Any) -> DistillationConfig:
    """One step of the shipped models, which know their task."""
    path = folder / "modchain.yaml"
    path.write_text(
        "model: modchain/student\nteacher: {model: modchain/teacher}\noutput_dir: run\n"
        "rollout: {max_completion_length: 40}\ntrain: {train_iters: 1, global_batch_size: 8, micro_batch_size: 4}\n"
    )
    overrides = [f"{key}={value}" for key, value in changes.items()]
    config = load_recipe("train", path, ["parallel.tensor_model_parallel_size=2", *overrides]).config
    assert isinstance(config, DistillationConfig)
    return config


def _unchanged(folder: Path) -> dict[str, Any]:
    return {}


def _other_ends(folder: Path) -> dict[str, Any]:
    """A teacher that ends its completions at a minus sign."""
    from renio_megatron.data.sources.modchain import SYMBOLS
    from renio_megatron.models.shipped import model_directory

    target = folder / f"other_ends_{torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}"
    shutil.copytree(model_directory("modchain/teacher", "model"), target, dirs_exist_ok=True)
    (target / "generation_config.json").write_text(f'{{"eos_token_id": {SYMBOLS.index("-")}}}')
    return {"teacher.model": target}


@contextlib.contextmanager
def _nothing(algorithm: Any) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _other_weights(algorithm: Any) -> Iterator[None]:
    """The sampler draws with weights that are not the trained ones."""
    sample, parameters = (
        algorithm.sampler.sample,
        [parameter for _, parameter in algorithm.learner.part.named_parameters()],
    )

    def sample_with_others(*args: Any, **more: Any) -> Any:
        kept = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.8)
        drawn = sample(*args, **more)
        with torch.no_grad():
            for parameter, own in zip(parameters, kept, strict=True):
                parameter.copy_(own)
        return drawn

    algorithm.sampler.sample = sample_with_others
    yield


@contextlib.contextmanager
def _shifted(algorithm: Any, by: int) -> Iterator[None]:
    """The teacher's rows are those of the tokens beside."""
    from renio_megatron.megatron.teacher import shared_layout

    collate = shared_layout.collate

    def shifted(*args: Any, **more: Any) -> Any:
        return [
            replace(batch, row_index=(batch.row_index + by).clamp(max=batch.token_ids.numel() - 1))
            for batch in collate(*args, **more)
        ]

    shared_layout.collate = shifted  # type: ignore[attr-defined]
    try:
        yield
    finally:
        shared_layout.collate = collate  # type: ignore[attr-defined]


@contextlib.contextmanager
def _rows_before(algorithm: Any) -> Iterator[None]:
    with _shifted(algorithm, -1):
        yield


@contextlib.contextmanager
def _rows_behind(algorithm: Any) -> Iterator[None]:
    with _shifted(algorithm, 1):
        yield


@contextlib.contextmanager
def _other_ids(algorithm: Any) -> Iterator[None]:
    """The teacher reads one token of each completion otherwise."""
    score = algorithm.teacher.score

    def score_others(rollouts: Sequence[Rollout], batches: Any) -> Any:
        others = []
        for rollout in rollouts:
            first, second, *rest = rollout.completion_ids
            others.append(replace(rollout, completion_ids=(first, second ^ 1, *rest)))
        return score(others, batches)

    algorithm.teacher.score = score_others
    yield


FAULTS: dict[str, tuple[Callable[[Path], dict[str, Any]], Callable[[Any], Any]]] = {
    "none": (_unchanged, _nothing),
    "sampler": (_unchanged, _other_weights),
    "rows before": (_unchanged, _rows_before),
    "rows behind": (_unchanged, _rows_behind),
    "ids": (_unchanged, _other_ids),
    "ends": (_other_ends, _nothing),
    "boundary": (lambda folder: {"data.teacher_template": "'{problem}*'"}, _nothing),
    "same model": (lambda folder: {"teacher.model": "modchain/student"}, _nothing),
    "only warned of": (lambda folder: {"canaries": "warn"}, _other_ids),
    "not looked for": (lambda folder: {"canaries": "off"}, _other_ids),
}
