"""Settings with which a run may be resumed, and differences between two runs' settings."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import OmegaConf

from renio_megatron.config.keys import Keys, as_recipe, as_tree
from renio_megatron.config.parser import literal
from renio_megatron.config.renamed import RENAMED
from renio_megatron.config.schema import SECTIONS, JobConfig
from renio_megatron.errors import ConfigError

# Settings that determine how a run is computed and not what: a run may be resumed with other values of them. fnmatch
# patterns, each with the reason why the run stays the same one. All other settings are fixed for the whole run, also
# parallel.use_distributed_optimizer: the results are the same, but the optimizer state is saved in another format.
CHANGEABLE: dict[str, str] = {
    "parallel.*_parallel*": "the same sums in another order; checkpoints know no layout",
    "parallel.overlap_*": "the same sums, sent at another time",
    "parallel.make_vocab_size_divisible_by": "padding of the vocabulary, of which nothing is saved",
    "parallel.distributed_timeout_minutes": "how long a rank waits for the others",
    "train.micro_batch_size": "gradients are sums over the whole batch",
    "train.max_tokens_per_micro_batch": "gradients are sums over the whole batch",
    "train.recompute_*": "the same activations, kept or computed again",
    "train.deterministic_mode": "the same sums, in an order that is always the same",
    "head.chunk_size": "gradients are sums over the tokens",
    "teacher.parallel.*": "the same hidden states, computed in another layout",
    "teacher.ranks": "the same hidden states, computed on other ranks",
    "teacher.data_parallel_size": "the same hidden states, computed on other ranks",
    "teacher.payload_device": "the same hidden states, kept elsewhere or computed again",
    "teacher.offload": "the same weights, kept elsewhere",
    "rollout.micro_batch_size": "a completion depends on its prompt and step alone",
    "rollout.log": "what is written of the completions",
    "device": "where the same sums are computed",
    "canaries": "whether a run that begins is looked at",
    "also_report*": "what is reported in addition to the weights",
    "rollout.prefix": "whether completions that are cut are warned of",
    "checkpoint.save_interval": "when the state is written",
    "checkpoint.ckpt_format": "how the state is written",
    "checkpoint.keep_last": "what is kept of what was written",
    "checkpoint.async_save": "who writes the state",
}

# Settings that name files or directories, which may be moved: what a run began with decides whether they are the same.
_PLACES = (
    *("model", "pretrained_checkpoint", "data.path", "data.eval_path"),
    *("teacher.model", "teacher.pretrained_checkpoint", "teacher.adapter"),
    *("teacher.routes.*.model", "teacher.routes.*.pretrained_checkpoint", "teacher.routes.*.adapter"),
)
_LENGTH = ("train.train_iters", "train.lr_decay_iters")
_NOT_THERE = "(not there)"
_OF_REPORTS = ("weighting.threshold", "weighting.ceiling", "weighting.temperature")
"""Settings that diagnostics also had with `weighting=uniform`."""


def to_yaml(config: JobConfig) -> str:
    """Every setting as YAML, in `SECTIONS`' order; `load_recipe` need not accept it, `differences` reads it."""
    values = as_recipe(config)
    ordered = {key: values[key] for key in (*SECTIONS, *values) if key in values}
    return OmegaConf.to_yaml(OmegaConf.create(literal(ordered)))


@dataclass(frozen=True)
class Change:
    """A setting of a run that is another one now; a missing one is `(not there)`."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """One line with both values."""
        return f"{self.key}: was {self.old!r}, is now {self.new!r}"


def differences(old_yaml: str, config: JobConfig) -> list[Change]:
    """Settings of what is computed that differ from those that `to_yaml` wrote.

    Those that only determine how it is computed are in `changes`, those that name other places in `moved`; `output_dir`
    is left out: a run directory may be moved. A missing setting has its default: an earlier version wrote the file.

    Raises:
        ConfigError: `old_yaml` is not a mapping in YAML.
    """
    old = _read(old_yaml)
    return [one for one in _differing(old, config) if not (_may_change(one, old, config) or _is_moved(one))]


def changes(old_yaml: str, config: JobConfig) -> list[Change]:
    """Differing settings with which a run may be resumed: `CHANGEABLE`, and its length where that may grow."""
    old = _read(old_yaml)
    return [one for one in _differing(old, config) if _may_change(one, old, config)]


def moved(old_yaml: str, config: JobConfig) -> list[Change]:
    """Settings that name another place than before, of which the contents decide whether it is the same."""
    return [one for one in _differing(_read(old_yaml), config) if _is_moved(one)]


def _may_change(change: Change, old: Mapping[str, Any], config: JobConfig) -> bool:
    if change.key not in _LENGTH:
        return is_changeable(change.key)
    before = _Length.of(old)
    return before is not None and before.may_become(config)


def _is_moved(change: Change) -> bool:
    names_a_place = any(fnmatch.fnmatchcase(change.key, pattern) for pattern in _PLACES)
    return names_a_place and all(isinstance(one, str) and one != _NOT_THERE for one in (change.old, change.new))


def is_longer(old_yaml: str, config: JobConfig) -> bool:
    """Whether these settings have more steps than those that `to_yaml` wrote."""
    before = _Length.of(_read(old_yaml))
    return before is not None and before.steps < config.train.train_iters


def length_advice(old_yaml: str, config: JobConfig) -> str:
    """What to do where a run cannot get these settings' number of steps."""
    before = _Length.of(_read(old_yaml))
    if before is None or before.steps > config.train.train_iters:
        return "The steps of a run may become more, not fewer."
    return (
        f"The decay of its rate ends at step {before.decay_end}: train.lr_decay_iters={before.decay_end} keeps that, "
        "and more steps have train.min_lr."
    )


@dataclass(frozen=True)
class _Length:
    """How long a run is, and the rate of its steps: of what `to_yaml` wrote."""

    steps: int
    decay_end: int

    @classmethod
    def of(cls, old: Mapping[str, Any]) -> _Length | None:
        steps, end = old.get("train.train_iters"), old.get("train.lr_decay_iters")
        return cls(steps, end if isinstance(end, int) else steps) if isinstance(steps, int) else None

    def may_become(self, config: JobConfig) -> bool:
        """Whether the run goes on with these settings: no step is taken back, and none has another rate."""
        return self.steps <= config.train.train_iters and config.train.decay_end in (None, self.decay_end)


def of_before(old_yaml: str, config: JobConfig) -> str:
    """How settings written by an earlier version's `to_yaml` are read differently now; empty where none are."""
    written = _read(old_yaml)
    keys = Keys(type(config), as_recipe(config))
    left_out = [key for key in written if keys.misplaced(RENAMED.get(key, key)) is not None]
    said = [f"{key} is called {RENAMED[key]}" for key in written if key in RENAMED and key not in left_out]
    if reported := [key for key in left_out if key in _OF_REPORTS]:
        said.append(
            f"ReNIO's diagnostics, with {', '.join(reported)}, are there where also_report=[renio] asks for them"
        )
        left_out = [key for key in left_out if key not in _OF_REPORTS]
    if left_out:
        said.append(f"{', '.join(left_out)} had no effect, and {'are' if len(left_out) > 1 else 'is'} left out")
    return "; ".join(said)


def _read(text: str) -> dict[str, Any]:
    try:
        return _flatten(yaml.safe_load(text))
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError("the settings are not a mapping in YAML.") from error


def _differing(old: Mapping[str, Any], config: JobConfig) -> list[Change]:
    new = _read(to_yaml(config))
    keys = Keys(type(config), as_recipe(config))
    old = {RENAMED.get(key, key): value for key, value in old.items()}
    old = {key: value for key, value in old.items() if keys.misplaced(key) is None}
    sections = {key.rpartition(".")[0] for key in old}
    for key in new.keys() - old.keys():  # a setting that is newer than the file
        if not _is_chosen(key.rpartition(".")[0], keys) or key.rpartition(".")[0] in sections:
            old[key] = default_of(config, key)
    return [
        Change(key, old.get(key, _NOT_THERE), new.get(key, _NOT_THERE))
        for key in dict.fromkeys([*new, *old])
        if key != "output_dir" and old.get(key) != new.get(key)
    ]


def _is_chosen(section: str, keys: Keys) -> bool:
    """Whether a section exists only because a recipe lists or names it."""
    return section.rpartition(".")[0] in keys.tables | keys.lists


def default_of(config: JobConfig, key: str) -> Any:
    """The default of a dotted key; None where it has none."""
    section: Any = config
    *path, last = key.split(".")
    for name in path:
        if isinstance(section, tuple):
            section = section[int(name)]
        else:
            section = section[name] if isinstance(section, Mapping) else getattr(section, name)
    own = next(one for one in dataclasses.fields(section) if one.name == last)
    return None if own.default is dataclasses.MISSING else own.default


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        is_section = isinstance(value, dict) or (isinstance(value, list) and all(isinstance(x, dict) for x in value))
        flat.update(_flatten(as_tree(value), f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value})
    return flat


def is_changeable(key: str) -> bool:
    """Whether a run may be resumed with another value of this dotted key; see `CHANGEABLE`."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in CHANGEABLE)
