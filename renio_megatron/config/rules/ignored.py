"""Rules about settings that a recipe must give, and settings that have no effect together with others.

A setting that would be ignored is an error, because the recipe's author expects it to have an effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from renio_megatron.config import TeacherParallelConfig, TeacherPrecisionConfig
from renio_megatron.config.sections.data import SOURCES
from renio_megatron.config.sections.weighting import renio_in
from renio_megatron.config.tagged import Tagged
from renio_megatron.config.teachers import TeacherSpec
from renio_megatron.config.validators import require_choice
from renio_megatron.errors import ConfigError
from renio_megatron.objective.divergences import DIVERGENCE_INFO

# Names in the tables. Names from modules that import torch are repeated here, so that a typo is found without torch.
CHOICES: dict[str, Collection[str]] = {
    "loss.divergence": DIVERGENCE_INFO,
    "data.source": SOURCES,
}


@dataclass(frozen=True)
class _Ignored:
    """Keys that have no effect where `when(config)` holds."""

    keys: tuple[str, ...]
    when: Callable[[Any], bool]
    because: str


@dataclass(frozen=True)
class _Needed:
    """A key that must not be null where `when(config)` holds."""

    key: str
    when: Callable[[Any], bool]
    because: str


def _all_routes_have(config: Any, key: str) -> bool:
    routes = config.teacher.routes.values()
    return bool(routes) and all(getattr(route, key) is not None for route in routes)


def _reads_files(config: Any) -> bool:
    return "path" in config.data.source_info.settings


_IGNORED_BY_ALL = (
    _Ignored(
        ("data.path", "data.eval_path"),
        lambda config: not _reads_files(config),
        "only the sources jsonl and datasets read records",
    ),
    _Ignored(
        ("data.subset", "data.split", "data.eval_split"),
        lambda config: "split" not in config.data.source_info.settings,
        "only data.source=datasets reads splits of a data set",
    ),
    _Ignored(
        tuple(f"data.{name}_key" for name in ("problem", "solution", "answer", "teacher", "teacher_prompt")),
        lambda config: not config.data.source_info.has_records,
        "only the sources jsonl and datasets read records",
    ),
    _Ignored(
        ("data.task", "data.size"),
        lambda config: "task" not in config.data.source_info.settings,
        "only data.source=reasoning_gym generates problems of a task",
    ),
    _Ignored(
        ("data.enable_thinking", "data.teacher_enable_thinking", "data.student_system", "data.teacher_system"),
        lambda config: not config.data.chat,
        "data.chat is false and no chat template is applied",
    ),
    _Ignored(
        ("data.sandbox",),
        lambda config: config.data.grader not in (None, "code"),
        "only data.grader=code runs programs",
    ),
    _Ignored(
        ("data.grader_errors",),
        lambda config: config.data.grader == "none",
        "data.grader is none and nothing is graded",
    ),
    _Ignored(
        (
            *("data.eval_path", "data.eval_split"),
            *(f"evaluate.{name}" for name in ("samples", "temperature", "top_p", "top_k", "max_completion_length")),
            *(f"evaluate.{name}" for name in ("benchmarks", "benchmarks_dir", "grader", "n", "limit", "instruction")),
        ),
        lambda config: config.evaluate.every == 0,
        "evaluate.every is 0 and nothing is evaluated",
    ),
    _Ignored(
        tuple(f"evaluate.{name}" for name in ("benchmarks_dir", "grader", "n", "limit", "instruction")),
        lambda config: config.evaluate.every > 0 and not config.evaluate.benchmarks,
        "evaluate.benchmarks is null",
    ),
    _Ignored(
        ("evaluate.samples",),
        lambda config: config.evaluate.every > 0 and not config.evaluates_held_out,
        "data.eval_path and data.eval_split are null: only benchmarks are evaluated",
    ),
    _Ignored(
        ("train.micro_batch_size",),
        lambda config: config.train.max_tokens_per_micro_batch is not None,
        "train.max_tokens_per_micro_batch packs as many sequences as fit",
    ),
    _Ignored(
        ("train.recompute_method", "train.recompute_num_layers"),
        lambda config: config.train.recompute_granularity != "full",
        "only train.recompute_granularity=full recomputes whole layers",
    ),
    _Ignored(
        ("checkpoint.async_save",),
        lambda config: config.checkpoint.async_save and config.checkpoint.save_interval >= config.train.train_iters,
        "checkpoint.save_interval is not below train.train_iters: only the last step is saved, and waited for",
    ),
    _Ignored(
        ("lora.alpha", "lora.dropout", "lora.use_rslora", "lora.targets", "lora.adapter"),
        lambda config: config.lora.r is None,
        "lora.r is null and the whole student is trained",
    ),
    _Ignored(
        ("train.min_lr", "train.lr_decay_iters"),
        lambda config: config.train.lr_decay_style == "constant",
        "train.lr_decay_style is constant and the rate does not decay",
    ),
)


def _without_fp8(section: str) -> tuple[_Ignored, ...]:
    keys = ("fp8_recipe", "fp8_param_gather", "first_last_layers_bf16", "emulate_fp8")
    counts = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    return (
        _Ignored(
            tuple(f"{section}.{key}" for key in (*keys, *counts)),
            lambda config: getattr(config, section).fp8 is None,
            f"{section}.fp8 is null and no layer computes in FP8",
        ),
        _Ignored(
            tuple(f"{section}.{key}" for key in counts),
            lambda config: not getattr(config, section).first_last_layers_bf16,
            f"{section}.first_last_layers_bf16 is false",
        ),
        _Ignored(
            (f"{section}.fp8_param_gather",),
            lambda config: getattr(config, section).emulate_fp8,
            f"{section}.emulate_fp8 keeps parameters as they are",
        ),
    )


_TEACHER_PRECISION = tuple(f"teacher_precision.{field.name}" for field in dataclasses.fields(TeacherPrecisionConfig))
_TEACHER_LAYOUT = tuple(f"teacher.parallel.{field.name}" for field in dataclasses.fields(TeacherParallelConfig))

_IGNORED_BY_DISTILLATION = (
    _Ignored(
        (*_TEACHER_PRECISION, *_TEACHER_LAYOUT, "teacher.ranks", "teacher.bf16", "teacher.offload"),
        lambda config: config.teachers[0].shares_student,
        "the teacher is the student's own modules (teacher.kind=ema, current, or initial with lora.r)",
    ),
    _Ignored(
        ("teacher.data_parallel_size",),
        lambda config: config.teacher.ranks == "colocated",
        "teacher.ranks is colocated, and there are as many copies as the ranks allow",
    ),
    _Ignored(
        ("teacher.system", "teacher.enable_thinking"),
        lambda config: not config.data.chat,
        "data.chat is false and no chat template is applied",
    ),
    *_without_fp8("teacher_precision"),
    _Ignored(
        ("teacher_precision.fp8_param_gather",),
        lambda config: True,
        "a teacher's parameters are never gathered; they are kept in FP8 in any case",
    ),
    _Ignored(
        ("loss.beta",),
        lambda config: config.loss.divergence is not None and not DIVERGENCE_INFO[config.loss.divergence].takes_beta,
        "loss.divergence names a divergence without that parameter",
    ),
    _Ignored(
        ("loss.entry_floor",),
        lambda config: config.loss.entry_clip is None,
        "loss.entry_clip is null, which switches both bounds off",
    ),
)
_IGNORED_BY_ROUTES = (
    _Ignored(
        tuple(f"teacher.{key}" for key in ("kind", "model", "pretrained_checkpoint", "adapter", "ema_decay")),
        lambda config: bool(config.teacher.routes),
        "teacher.routes says it for each of the teachers",
    ),
    _Ignored(
        ("data.teacher_key",),
        lambda config: not config.teacher.routes,
        "teacher.routes is empty and there is one teacher",
    ),
    _Ignored(
        ("data.teacher_template",),
        lambda config: _all_routes_have(config, "template"),
        "each of teacher.routes has a template of its own",
    ),
    _Ignored(
        ("data.teacher_system",),
        lambda config: _all_routes_have(config, "system"),
        "each of teacher.routes has a system turn of its own",
    ),
    _Ignored(
        ("data.teacher_prompt_key",),
        lambda config: config.data.teacher_template is not None,
        "data.teacher_template says what the teacher sees",
    ),
    _Ignored(
        ("data.teacher_enable_thinking",),
        lambda config: _all_routes_have(config, "enable_thinking"),
        "each of teacher.routes has its own enable_thinking",
    ),
)
_IGNORED_BY_SFT = (
    _Ignored(
        (
            *("data.teacher_key", "data.teacher_template", "data.teacher_system", "data.teacher_enable_thinking"),
            "data.teacher_prompt_key",
        ),
        lambda config: True,
        "supervised fine-tuning has no teacher",
    ),
    _Ignored(
        ("init",),
        lambda config: config.checkpoint.load is not None,
        "the weights come from checkpoint.load",
    ),
    _Ignored(
        ("pretrained_checkpoint",),
        lambda config: config.init == "random",
        "init is random and no weights are read",
    ),
    _Ignored(
        ("pretrained_checkpoint",),
        lambda config: config.checkpoint.load is not None and config.lora.r is None,
        "the weights come from checkpoint.load",
    ),
)
_IGNORED = {"distillation": _IGNORED_BY_DISTILLATION, "sft": _IGNORED_BY_SFT}
"""Algorithm -> its own rules, which come before the common ones."""

_NEEDED_BY_ALL = (
    _Needed("data.path", _reads_files, "the sources jsonl and datasets read records from it"),
    _Needed(
        "data.eval_path",
        lambda config: _reads_files(config) and config.evaluates_held_out and not config.data.has_eval_split,
        "evaluate.every is above 0 and held-out problems are read from it; evaluate.every=0 does without, and so do "
        "evaluate.benchmarks and, of a data set, data.eval_split",
    ),
    _Needed(
        "data.task",
        lambda config: "task" in config.data.source_info.settings,
        "it names the generator of reasoning_gym, for example gsm_symbolic",
    ),
)
_NEEDED_BY_SFT = (
    _Needed(
        "evaluate.max_completion_length",
        lambda config: config.evaluate.every > 0,
        "a fine-tuning recipe has no rollout.max_completion_length to follow; evaluate.every=0 does without",
    ),
)
_NEEDED_BY_DISTILLATION = (
    _Needed(
        "data.teacher_key",
        lambda config: bool(config.teacher.routes),
        "teacher.routes has several teachers, and this column of the records names one of them",
    ),
)
_NEEDED = {"distillation": _NEEDED_BY_DISTILLATION, "sft": _NEEDED_BY_SFT}
"""Algorithm -> its own rules of required keys, which come after the common ones."""


def check_settings(config: Any) -> None:
    """Raises `ConfigError` for names that are in no table, and for missing settings.

    Args:
        config: a JobConfig.
    """
    for key, choices in CHOICES.items():
        if hasattr(config, key.partition(".")[0]) and (value := _value(config, key)) is not None:
            require_choice(key, value, choices)
    _check_needed(config)


def refuse_ignored(reasons: Mapping[str, str], bases: Mapping[str, str], written: Mapping[str, str]) -> None:
    """Raises `ConfigError` for settings without effect.

    Args:
        reasons: key -> why it has none.
        bases: key -> the file that sets it, where that is a base of the recipe.
        written: key -> what stands in the recipe for it, where that is not the key itself.
    """
    lines = []
    for key, because in reasons.items():
        where = f" in {bases[key]}" if key in bases else ""
        lines.append(
            f"{written.get(key, key)} is set{where} but would be ignored: {because}. Remove it or set it to null."
        )
    if lines:
        raise ConfigError("\n".join(lines))


def _check_needed(config: Any) -> None:
    for rule in (*_NEEDED_BY_ALL, *_NEEDED.get(config.algorithm, ())):
        if _value(config, rule.key) is None and rule.when(config):
            raise ConfigError(f"{rule.key} is missing: {rule.because}.")


def ignored_settings(config: Any, explicit: frozenset[str]) -> dict[str, str]:
    """Every key that was set and has no effect, each with the first reason that applies.

    A setting that several teachers share has no effect only where it has none on any of them.

    Args:
        config: a JobConfig.
        explicit: dotted keys that were set to something other than null.
    """
    reasons: dict[str, str] = {}
    teachers = {one.name: _with_one_teacher(config, one) for one in config.teachers} or {"": config}
    general = _IGNORED_BY_ROUTES if config.teachers else ()
    rules = (*_IGNORED.get(config.algorithm, ()), *_IGNORED_BY_ALL, *_without_fp8("precision"))
    for rule in (*general, *rules):
        for key in rule.keys:
            if key in explicit and (
                rule.when(config) if rule in general else all(rule.when(one) for one in teachers.values())
            ):
                reasons.setdefault(key, rule.because)
            for name, one in teachers.items():
                own = key.replace("teacher.", f"teacher.routes.{name}.", 1)
                if own in explicit and key not in explicit and rule.when(one):
                    reasons.setdefault(own, rule.because.replace("teacher.", f"teacher.routes.{name}."))
    if config.teachers and renio_in(config.weighting) is not None:
        because = "ReNIO is in the weighting, and its diagnostics are reported anyway"
        reasons |= {key: because for key in sorted(explicit) if key.startswith("also_report.")}
    for section, settings in _tagged_sections(config):
        for name, because in settings.without_effect().items():
            if (key := f"{section}.{name}") in explicit:
                reasons.setdefault(key, because.replace(f"{settings.SECTION}.", f"{section}."))
    return reasons


def _tagged_sections(settings: Any, prefix: str = "") -> Iterator[tuple[str, Tagged]]:
    """(dotted key, settings) of each section whose class a key picks."""
    for name, value in vars(settings).items():
        inside = {"": value}
        if isinstance(value, Mapping):
            inside = {f".{key}": one for key, one in value.items()}
        elif isinstance(value, tuple):
            inside = {f".{number}": one for number, one in enumerate(value)}
        for key, one in inside.items():
            if dataclasses.is_dataclass(one):
                if isinstance(one, Tagged):
                    yield f"{prefix}{name}{key}", one
                yield from _tagged_sections(one, f"{prefix}{name}{key}.")


def _with_one_teacher(config: Any, one: TeacherSpec) -> Any:
    """The settings of a run with this teacher alone, to which rules about one teacher are applied."""
    return dataclasses.replace(config, teacher=one.settings, teacher_precision=one.precision, data=one.data)


def _value(config: Any, key: str) -> Any:
    return reduce(getattr, key.split("."), config)
