"""Recipes: the whole of a run's settings, read from YAML and checked as a whole before any rank starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from renio_megatron.data.sources import check_file
from renio_megatron.errors import ConfigError
from renio_megatron.expert_rules import check_expert_ranks, check_experts
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
from renio_megatron.models.family_defaults import FAMILY_DEFAULTS
from renio_megatron.models.shipped import model_directory
from renio_megatron.recipe_checks import check_combinations, check_weighting
from renio_megatron.recipe_file import literal, read_recipe
from renio_megatron.recipe_rules import check_settings, ignored_settings, is_changeable, refuse_ignored
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
from renio_megatron.teacher_routes import setting_of, shares_student, single_teachers

MODEL_TYPES = tuple(FAMILY_DEFAULTS)
_PLAIN_KEYS = ("model", "pretrained_checkpoint", "init", "output_dir")


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
        dropped: the recipe's own keys that the command line left without effect, and why; they have their defaults.
    """

    config: RunConfig | SftConfig
    explicit: frozenset[str]
    kind: str
    dropped: Mapping[str, str] = field(default_factory=dict)

    def dropped_lines(self) -> list[str]:
        """A sentence for each reason why keys were dropped."""
        keys: dict[str, list[str]] = {}
        for key, because in self.dropped.items():
            keys.setdefault(because, []).append(key)
        return [f"left out of the recipe: {', '.join(names)}: {because}" for because, names in keys.items()]


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
    try:
        recipe = _read(kind, path, overrides)
    except ConfigError as error:
        if kind == "train" and _reads_as_sft(path, overrides):
            raise ConfigError(f"{error} (The recipe reads as one of `renio sft`: it names no teacher.)") from error
        if kind == "sft" and _names_a_teacher(path):
            raise ConfigError(
                f"{path} names a teacher, so it is a recipe of `renio train`; `renio sft` learns from given "
                "completions. Start it with `renio train`, or leave out what concerns a teacher."
            ) from error
        raise
    check_combinations(kind, recipe.config)
    return recipe


def _read(kind: str, path: str | Path, overrides: Sequence[str]) -> Recipe:
    """The recipe, without those of its own keys that have no effect because of the command line.

    Keys without effect are an error where the command line gave them, and where the recipe alone has the mistake.
    """
    dropped: dict[str, str] = {}
    while True:
        config, explicit, given = read_recipe(SCHEMAS[kind], path, overrides, without=dropped)
        check_settings(kind, config)
        ignored = ignored_settings(kind, config, explicit)
        if not ignored:
            return Recipe(config=config, explicit=explicit, kind=kind, dropped=dropped)
        mistakes = _mistakes_of(kind, path, overrides)
        refuse_ignored({key: because for key, because in ignored.items() if key in given or key in mistakes})
        dropped |= ignored


def _mistakes_of(kind: str, path: str | Path, overrides: Sequence[str]) -> frozenset[str]:
    """Keys of a recipe that have no effect without the command line; of that only keys outside of sections are used."""
    try:
        plain = [text for text in overrides if text.partition("=")[0].strip() in _PLAIN_KEYS]
        config, explicit, _ = read_recipe(SCHEMAS[kind], path, plain)
        return frozenset(ignored_settings(kind, config, explicit))
    except ConfigError:  # it needs the command line to be a recipe at all
        return frozenset()


def _names_a_teacher(path: str | Path) -> bool:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("teacher") is not None


def kind_of(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Which command a recipe is for: `sft` where it reads as one and names no teacher, else `train`."""
    return "sft" if _reads_as_sft(path, overrides) else "train"


def _reads_as_sft(path: str | Path, overrides: Sequence[str]) -> bool:
    try:
        _read("sft", path, overrides)
    except ConfigError:
        return False
    return True


def check_world(config: RunConfig | SftConfig, world_size: int) -> None:
    """Raises `ConfigError` where a run cannot be shared among `world_size` ranks, or its batch cannot be divided."""
    if isinstance(config, RunConfig):
        check_teacher_layout(config.parallel, config.teacher, world_size)
        world_size -= num_scorers(config.parallel, config.teacher)
    check_layout(config.parallel, config.train, world_size)
    check_expert_ranks(config.parallel, config.train, world_size)
    if isinstance(config, RunConfig) and config.weighting.name == "renio":
        check_weighting(config.weighting, config.train.global_batch_size)


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
    for name, one in single_teachers(config).items() if isinstance(config, RunConfig) else ():
        setting = setting_of(name, "model")
        layouts[setting] = teacher_parallel(one.parallel, one.teacher)
        if one.teacher.kind == "separate":
            assert one.teacher.model is not None
            section = "teacher.parallel" if has_own_layout(one.parallel, one.teacher) else "parallel"
            models[setting] = _check_model(setting, one.teacher.model, layouts[setting], trained=False, section=section)
        elif not shares_student(one):
            models[setting] = models["model"]
    check_experts(config, models, layouts)


def check_data(config: RunConfig | SftConfig) -> None:
    """Raises `ConfigError` or `DataError` where a file of records is not there, or not what it should be."""
    check_file(config.data, "train")
    if config.evaluate.every:
        check_file(config.data, "eval")


def to_yaml(config: RunConfig | SftConfig) -> str:
    """Every setting as YAML, in the order of the fields; `load_recipe` need not accept it, `differences` reads it."""
    return OmegaConf.to_yaml(OmegaConf.create(literal(dataclasses.asdict(config))))


def differences(old_yaml: str, config: RunConfig | SftConfig) -> list[str]:
    """A line for each setting of what is computed that differs from those that `to_yaml` wrote, with both values.

    Those that only say how it is computed are `changes`; `output_dir` is left out: a run directory may be moved. A
    setting that is not there has its default: an earlier version wrote it.

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
    for key in new.keys() - old.keys():  # a setting that is newer than what was written
        old[key] = _default_of(config, key)
    return {
        key: f"{key}: was {old.get(key, '(not there)')!r}, is now {new.get(key, '(not there)')!r}"
        for key in dict.fromkeys([*new, *old])
        if key != "output_dir" and old.get(key) != new.get(key)
    }


def _default_of(config: RunConfig | SftConfig, key: str) -> Any:
    """The default of a dotted key; None where it has none."""
    section: Any = config
    *path, last = key.split(".")
    for name in path:
        section = getattr(section, name, None)
    if not dataclasses.is_dataclass(section):  # one of a table's sections
        return None
    own = next(one for one in dataclasses.fields(section) if one.name == last)
    return None if own.default is dataclasses.MISSING else own.default


def _check_model(
    setting: str, name: str, parallel: ParallelConfig, *, trained: bool, section: str = "parallel"
) -> dict[str, Any]:
    """What config.json of the model holds, with what its family has where it says nothing."""
    file = model_directory(name, setting) / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{setting}: {file} cannot be read as JSON: {error}.") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{setting}: {file} has model_type {model_type!r}; supported are {', '.join(MODEL_TYPES)}. "
            "Choose a model of one of these types."
        )
    content = _with_defaults(content)
    counts = {key: _count(content, key, setting, file) for key in ("num_attention_heads", "num_hidden_layers")}
    counts["num_key_value_heads"] = (
        counts["num_attention_heads"]
        if content.get("num_key_value_heads") is None
        else _count(content, "num_key_value_heads", setting, file)
    )
    check_cut(setting, str(file), counts, parallel, trained=trained, section=section)
    return content


def _with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json and those that it leaves out; experts are counted under either of two names."""
    defaults = FAMILY_DEFAULTS[content["model_type"]]
    names = {"num_experts", "num_local_experts"}
    is_counted = bool(names & content.keys())
    return {key: value for key, value in defaults.items() if not (is_counted and key in names)} | dict(content)


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
