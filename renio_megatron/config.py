"""Recipes: the whole of a run's settings, read from YAML and checked as a whole before any rank starts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from renio_megatron.assets import model_directory
from renio_megatron.errors import ConfigError
from renio_megatron.expert_rules import MIXTURE_TYPES, check_expert_ranks, check_experts
from renio_megatron.layout_rules import (
    check_adapters_cut,
    check_cut,
    check_layout,
    check_recomputation,
    check_teacher_layout,
    fewest_ranks,
    has_own_layout,
    num_scorers,
    teacher_parallel,
)
from renio_megatron.recipe_file import read_recipe
from renio_megatron.recipe_rules import check_settings, is_changeable, shares_student
from renio_megatron.settings import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    HeadConfig,
    LoraConfig,
    LossConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TeacherConfig,
    TeacherPrecisionConfig,
    TrainConfig,
    WeightingConfig,
)
from renio_megatron.settings.checks import require_choice

MODEL_TYPES = ("llama", "qwen2", "qwen3", *MIXTURE_TYPES)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of `renio train`: on-policy distillation.

    Attributes:
        model: the student's Hugging Face directory, or a model that ships with the package.
        pretrained_checkpoint: a checkpoint that Megatron wrote (torch_dist, of any layout), whose weights are the
            student's in place of those in `model`; null: `model`'s. config.json and the tokenizer are `model`'s.
        teacher, data, rollout, loss, head, weighting, parallel, precision, teacher_precision, lora, train, checkpoint,
            evaluate: sections, see `settings`.
        output_dir: the run directory.
    """

    model: str
    pretrained_checkpoint: str | None = None
    teacher: TeacherConfig
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    teacher_precision: TeacherPrecisionConfig = field(default_factory=TeacherPrecisionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    output_dir: str


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Settings of `renio sft`: supervised fine-tuning on given completions.

    Attributes:
        model: Hugging Face directory, or a model that ships with the package.
        pretrained_checkpoint: where the weights come from in place of `model`'s, as in `RunConfig`.
        init: `pretrained` starts from the directory's weights; `random` from random weights of its config.json.
        data, parallel, precision, lora, train, checkpoint, evaluate: sections, see `settings`.
        output_dir: the run directory.
    """

    model: str
    pretrained_checkpoint: str | None = None
    init: str = "pretrained"
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    output_dir: str

    def __post_init__(self) -> None:
        require_choice("init", self.init, ("pretrained", "random"))


SCHEMAS: dict[str, type[RunConfig] | type[SftConfig]] = {"train": RunConfig, "sft": SftConfig}


@dataclass(frozen=True)
class Recipe:
    """A recipe after all checks that need neither the models nor the number of ranks.

    Attributes:
        config: the settings.
        explicit: dotted keys that the recipe or the command line set to something other than null.
        kind: `train` or `sft`.
    """

    config: RunConfig | SftConfig
    explicit: frozenset[str]
    kind: str


def load_recipe(kind: str, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file and the `key=value` settings of a command line, checked.

    Args:
        kind: `train` or `sft`.
        path: the YAML file.
        overrides: for example `["train.lr=1e-5", "weighting=uniform"]`; see `recipe_file.read_recipe`.

    Raises:
        ConfigError: the file, a key, a value or a combination of values cannot be used.
    """
    require_choice("the kind of a recipe", kind, SCHEMAS)
    config, explicit = read_recipe(SCHEMAS[kind], path, overrides)
    check_settings(kind, config, explicit)
    if isinstance(config, RunConfig):
        _check_self_teacher(config)
        _check_packing(config)
        _check_head(config)
    _check_precision(config)
    if config.lora.r is not None:
        _check_lora(config)
    return Recipe(config=config, explicit=explicit, kind=kind)


def check_world(config: RunConfig | SftConfig, world_size: int) -> None:
    """Raises `ConfigError` where a run cannot be shared among `world_size` ranks, or its batch cannot be divided."""
    if isinstance(config, RunConfig):
        check_teacher_layout(config.parallel, config.teacher, world_size)
        world_size -= num_scorers(config.parallel, config.teacher)
    check_layout(config.parallel, config.train, world_size)
    check_expert_ranks(config.parallel, config.train, world_size)
    if isinstance(config, RunConfig) and config.weighting.name == "renio":
        _check_weighting(config.weighting, config.train.global_batch_size)


def smallest_world(config: RunConfig | SftConfig) -> int:
    """Ranks that hold one copy of each model."""
    return fewest_ranks(config.parallel, config.teacher if isinstance(config, RunConfig) else None)


def check_models(config: RunConfig | SftConfig) -> None:
    """Raises `ConfigError` where a model cannot be run, or cut as `parallel` asks; reads only the config.json files."""
    models = {"model": _check_model("model", config.model, config.parallel, trained=True)}
    check_recomputation(models["model"]["num_hidden_layers"], config.parallel, config.train)
    if config.lora.r is not None:
        check_adapters_cut(models["model"], config.parallel)
    layouts = {"model": config.parallel}
    if isinstance(config, RunConfig):
        layouts["teacher.model"] = teacher_parallel(config.parallel, config.teacher)
        if config.teacher.kind == "separate":
            assert config.teacher.model is not None
            models["teacher.model"] = _check_model(
                "teacher.model", config.teacher.model, layouts["teacher.model"], trained=False
            )
        elif not shares_student(config):
            models["teacher.model"] = models["model"]
    check_experts(config, models, layouts)


def to_yaml(config: RunConfig | SftConfig) -> str:
    """Every setting as YAML, in the order of the fields; `load_recipe` need not accept it, `differences` reads it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(old_yaml: str, config: RunConfig | SftConfig) -> list[str]:
    """A line for each setting of what is computed that differs from those that `to_yaml` wrote, with both values.

    Those that only say how it is computed are `changes`; `output_dir` is left out: a run directory may be moved. A
    setting that is not there is the same as null.

    Raises:
        ConfigError: `old_yaml` is not a mapping in YAML.
    """
    return [line for key, line in _differing(old_yaml, config).items() if not is_changeable(key)]


def changes(old_yaml: str, config: RunConfig | SftConfig) -> list[str]:
    """The same for the settings with which a run may be continued: `recipe_rules.CHANGEABLE`."""
    return [line for key, line in _differing(old_yaml, config).items() if is_changeable(key)]


def _differing(old_yaml: str, config: RunConfig | SftConfig) -> dict[str, str]:
    try:
        old, new = _flatten(yaml.safe_load(old_yaml)), _flatten(yaml.safe_load(to_yaml(config)))
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError("the settings are not a mapping in YAML.") from error
    return {
        key: f"{key}: was {old.get(key, '(not there)')!r}, is now {new.get(key, '(not there)')!r}"
        for key in dict.fromkeys([*new, *old])
        if key != "output_dir" and old.get(key) != new.get(key)
    }


def _check_self_teacher(config: RunConfig) -> None:
    data, kind = config.data, config.teacher.kind
    same_text = data.teacher_template in (None, data.student_template)
    same_thinking = data.teacher_enable_thinking in (None, data.enable_thinking)
    if kind != "separate" and same_text and same_thinking:
        raise ConfigError(
            f"teacher.kind={kind} with the student's own view of the prompt: teacher and student are then the same "
            "model on the same text, and their KL is exactly zero at the first step. Give data.teacher_template "
            "something that the student does not see, for example {solution}, or set data.teacher_enable_thinking."
        )
    if shares_student(config) and config.teacher.payload_device == "recompute":
        raise ConfigError(
            f"teacher.kind={kind} with teacher.payload_device=recompute: student and teacher are one model, which "
            "cannot read for one of them in the middle of a step of the other. Choose host, which keeps as little on "
            "the device."
        )
    if kind == "ema" and config.precision.fp8_param_gather:
        raise ConfigError(
            "teacher.kind=ema with precision.fp8_param_gather=true: parameters that are kept in FP8 cannot be "
            "exchanged for their average. Set precision.fp8_param_gather=false."
        )


def _check_packing(config: RunConfig) -> None:
    limit, completion = config.train.max_tokens_per_micro_batch, config.rollout.max_completion_length
    # The last token is not read, and context parallelism pads each sequence by less than 2 x its ranks.
    context = config.parallel.context_parallel_size
    padding = 2 * context - 1 if context > 1 else 0
    longest = config.data.max_prompt_length + completion - 1 + padding
    if limit is not None and longest > limit:
        raise ConfigError(
            f"train.max_tokens_per_micro_batch={limit} cannot hold the longest sequence that the recipe allows: "
            f"data.max_prompt_length={config.data.max_prompt_length} and rollout.max_completion_length={completion} "
            f"make {longest} tokens. Raise it to {longest}, or lower one of the two."
        )


def _check_precision(config: RunConfig | SftConfig) -> None:
    sections: list[tuple[PrecisionConfig, str, bool]] = [(config.precision, "train.bf16", config.train.bf16)]
    if isinstance(config, RunConfig):
        own = config.teacher.bf16
        setting = "train.bf16" if own is None else "teacher.bf16"
        sections.append((config.teacher_precision, setting, config.train.bf16 if own is None else own))
        if (
            config.teacher.offload is not None
            and config.teacher_precision.fp8
            and not config.teacher_precision.emulate_fp8
        ):
            raise ConfigError(
                f"teacher.offload=host with teacher_precision.fp8={config.teacher_precision.fp8}: weights that are "
                "kept in FP8 are not moved. Set teacher.offload=null, or teacher_precision.fp8=null."
            )
    for one, setting, bf16 in sections:
        if one.fp8 is not None and not one.emulate_fp8 and not bf16:
            raise ConfigError(
                f"{one.section}.fp8={one.fp8} with {setting}=false: what stays out of FP8 would be fp32, and the "
                f"products gain nothing. Set {setting}=true."
            )
    if config.precision.fp8_param_gather:
        if not config.parallel.use_distributed_optimizer:
            raise ConfigError(
                "precision.fp8_param_gather=true needs parallel.use_distributed_optimizer=true: that optimiser gathers "
                "the parameters. Set it, or precision.fp8_param_gather=false."
            )
        if isinstance(config, SftConfig) and config.init != "pretrained":
            raise ConfigError(
                "precision.fp8_param_gather=true needs init=pretrained: random FP8 weights would be the same on every "
                "tensor-parallel rank. Set init=pretrained, or precision.fp8_param_gather=false."
            )


def _check_lora(config: RunConfig | SftConfig) -> None:
    r, precision = config.lora.r, config.precision
    if isinstance(config, SftConfig) and config.init != "pretrained":
        raise ConfigError(
            f"lora.r={r} with init={config.init}: everything but the adapters would stay random. Set init=pretrained, "
            "or lora.r=null."
        )
    if precision.backend == "te" or precision.fp8 is not None:
        setting = f"backend={precision.backend}" if precision.fp8 is None else f"fp8={precision.fp8}"
        raise ConfigError(
            f"lora.r={r} with precision.{setting}: adapters stand beside Megatron's own linear layers in the "
            "parameters' dtype; beside Transformer Engine's or FP8 products they are not built. Set "
            "precision.backend=local and precision.fp8=null, or lora.r=null."
        )
    if isinstance(config, RunConfig) and config.teacher.kind == "initial" and config.lora.adapter is not None:
        raise ConfigError(
            f"lora.adapter={config.lora.adapter!r} with teacher.kind=initial: the teacher is the student with its "
            "adapters switched off, so it would not be the student that the run starts from. Merge the adapter into "
            "the model and give that as `model`, or name a separate teacher."
        )


def _check_head(config: RunConfig) -> None:
    if config.head.logits_dtype == "bf16" and not config.train.bf16:
        raise ConfigError(
            "head.logits_dtype=bf16 with train.bf16=false: the models are fp32, and so are their logits. Set fp32."
        )
    if config.teacher.payload_device == "recompute" and has_own_layout(config.parallel, config.teacher):
        raise ConfigError(
            "teacher.payload_device=recompute beside a layout of the teacher's own (teacher.parallel, teacher.ranks): "
            "its ranks cannot read in the middle of the student's step. Choose host, which keeps as little on the "
            "device."
        )
    if config.head.logits_dtype == "bf16" and config.teacher.bf16 is False:
        raise ConfigError(
            "head.logits_dtype=bf16 with teacher.bf16=false: the teacher's logits would be rounded to what its "
            "weights were kept out of. Set head.logits_dtype=fp32, or teacher.bf16=null."
        )
    if config.teacher.payload_device == "recompute" and config.parallel.pipeline_model_parallel_size > 1:
        raise ConfigError(
            "teacher.payload_device=recompute needs parallel.pipeline_model_parallel_size=1: the teacher's stages "
            "cannot run inside the student's schedule. Choose host, which keeps as little on the device."
        )


def _check_weighting(weighting: WeightingConfig, num_sequences: int) -> None:
    if weighting.normalise == "batch" and num_sequences < 2:
        raise ConfigError(
            "weighting 'renio' needs at least 2 sequences per optimiser step to have a batch mean; got "
            f"{num_sequences}. Raise train.global_batch_size, or choose weighting.normalise=none."
        )
    if weighting.normalise == "group" and num_sequences % (weighting.group_size or 1):
        raise ConfigError(
            f"weighting.group_size={weighting.group_size} does not divide train.global_batch_size={num_sequences}. "
            "Choose a divisor of the batch."
        )


def _check_model(setting: str, name: str, parallel: ParallelConfig, *, trained: bool) -> dict[str, Any]:
    """What config.json of the model holds."""
    file = model_directory(name, setting) / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {file} cannot be read as JSON: {error}.") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{setting}: {file} has model_type {model_type!r}; supported are {', '.join(MODEL_TYPES)}. "
            "Choose a model of one of these types."
        )
    counts = {key: _count(content, key, setting, file) for key in ("num_attention_heads", "num_hidden_layers")}
    counts["num_key_value_heads"] = (
        counts["num_attention_heads"]
        if content.get("num_key_value_heads") is None
        else _count(content, "num_key_value_heads", setting, file)
    )
    check_cut(setting, str(file), counts, parallel, trained=trained)
    return dict(content)


def _count(content: Mapping[str, Any], key: str, setting: str, file: Path) -> int:
    value = content.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{setting}: {file} needs {key}, a whole number above 0; got {value!r}.")
    return value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
