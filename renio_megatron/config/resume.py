"""Which settings a run may be resumed with, and how two runs' settings differ."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf

from renio_megatron.config.parser import literal
from renio_megatron.config.renamed import RENAMED
from renio_megatron.config.schema import SECTIONS, JobConfig
from renio_megatron.errors import ConfigError

# Settings that say how a run is computed and not what: a run may be continued with other values of them. The patterns
# are fnmatch's; each with the reason why the run stays the same one. All other settings are the run's for good, also
# parallel.use_distributed_optimizer: the results are the same, but the optimiser's state is written in another form.
CHANGEABLE: dict[str, str] = {
    "parallel.*_parallel*": "the same sums in another order; checkpoints know no layout",
    "parallel.overlap_*": "the same sums, sent at another time",
    "parallel.make_vocab_size_divisible_by": "padding of the vocabulary, of which nothing is saved",
    "parallel.distributed_timeout_minutes": "when a rank gives up",
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
    "rollout.prefix": "whether a word is said about completions that are cut",
    "checkpoint.save_interval": "when the state is written",
    "checkpoint.ckpt_format": "how the state is written",
    "checkpoint.keep_last": "what is kept of what was written",
    "checkpoint.async_save": "who writes the state",
}


def to_yaml(config: JobConfig) -> str:
    """Every setting as YAML, in `SECTIONS`' order; `load_recipe` need not accept it, `differences` reads it."""
    values = dataclasses.asdict(config)
    ordered = {key: values[key] for key in (*SECTIONS, *values) if key in values}
    return OmegaConf.to_yaml(OmegaConf.create(literal(ordered)))


def differences(old_yaml: str, config: JobConfig) -> list[str]:
    """A line for each setting of what is computed that differs from those that `to_yaml` wrote, with both values.

    Those that only say how it is computed are `changes`; `output_dir` is left out: a run directory may be moved. A
    setting that is not there has its default: an earlier version wrote it.

    Raises:
        ConfigError: `old_yaml` is not a mapping in YAML.
    """
    return [line for key, line in _differing(old_yaml, config).items() if not is_changeable(key)]


def changes(old_yaml: str, config: JobConfig) -> list[str]:
    """The same for the settings with which a run may be continued: `CHANGEABLE`."""
    return [line for key, line in _differing(old_yaml, config).items() if is_changeable(key)]


def _differing(old_yaml: str, config: JobConfig) -> dict[str, str]:
    try:
        old, new = _flatten(yaml.safe_load(old_yaml)), _flatten(yaml.safe_load(to_yaml(config)))
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError("the settings are not a mapping in YAML.") from error
    old = {RENAMED.get(key, key): value for key, value in old.items()}
    for key in new.keys() - old.keys():  # a setting that is newer than what was written
        old[key] = _default_of(config, key)
    return {
        key: f"{key}: was {old.get(key, '(not there)')!r}, is now {new.get(key, '(not there)')!r}"
        for key in dict.fromkeys([*new, *old])
        if key != "output_dir" and old.get(key) != new.get(key)
    }


def _default_of(config: JobConfig, key: str) -> Any:
    """The default of a dotted key; None where it has none."""
    section: Any = config
    *path, last = key.split(".")
    for name in path:
        section = getattr(section, name, None)
    if not dataclasses.is_dataclass(section):  # one of a table's sections
        return None
    own = next(one for one in dataclasses.fields(section) if one.name == last)
    return None if own.default is dataclasses.MISSING else own.default


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def is_changeable(key: str) -> bool:
    """Whether a run may be continued with another value of this dotted key; see `CHANGEABLE`."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in CHANGEABLE)
