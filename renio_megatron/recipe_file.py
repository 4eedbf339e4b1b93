"""Reads a recipe (YAML) and the `key=value` settings of a command line into a dataclass; knows no key by name.

A schema is a dataclass whose fields are plain values (str, int, float, bool, or one of them or None) or sections:
dataclasses of the same kind. Inside this file the settings are flat: dotted key -> (value, where it was given).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from renio_megatron.errors import ConfigError

COMMAND_LINE = "command line"
_SELECTORS = ("name", "kind")
_WANTED = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: "a list of words",
}

_Schema = TypeVar("_Schema")
_Flat = dict[str, tuple[Any, str]]


def read_recipe(
    schema: type[_Schema], path: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[_Schema, frozenset[str]]:
    """The dataclass that a recipe and its overrides describe, and the keys they set.

    An override is `key=value` with a dotted key and a value in YAML. A plain word for a section that has a `name` or a
    `kind` (`weighting=uniform`) starts that section afresh with it. Null for a key that cannot be null is its default.

    Args:
        schema: the dataclass to build.
        path: the YAML file; None: there is none, only overrides.
        overrides: settings that replace those of the file, in the order of the command line.

    Returns:
        (config, explicit): explicit holds the dotted keys with a value other than null in the file or the overrides.

    Raises:
        ConfigError: the file cannot be read, or a key or a value is not one of the schema's.
    """
    types = leaf_types(schema)
    flat = {} if path is None else _flatten(_load(Path(path)), schema, str(path))
    _apply_overrides(flat, schema, overrides)
    explicit = frozenset(key for key, (value, _) in flat.items() if value is not None)
    flat = {key: entry for key, entry in flat.items() if entry[0] is not None or _may_be_null(types[key])}
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        if field.name in types and field.default is dataclasses.MISSING and field.name not in flat:
            raise ConfigError(f"{path}: {field.name} is missing. Add it, or give {field.name}=... on the command line.")
    return _build(schema, flat), explicit


def sections(schema: type) -> dict[str, type]:
    """The fields of a schema that are dataclasses themselves, by dotted name; one before those inside it."""
    found: dict[str, type] = {}
    for name, hint in get_type_hints(schema).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found[name] = hint
            found.update({f"{name}.{inner}": section for inner, section in sections(hint).items()})
    return found


def leaf_types(schema: type) -> dict[str, Any]:
    """The type of every plain value of a schema, by dotted key, in the order of the fields."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(schema).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            types.update({f"{name}.{key}": value for key, value in leaf_types(hint).items()})
        else:
            types[name] = hint
    return types


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """The valid key that a wrong one most likely stands for; None where no key is alike.

    Keys are alike by their last part or, in different sections, as a whole; so a key in the wrong section is found,
    and a common section alone makes no likeness.

    >>> nearest_key("lr", ["train.lr", "train.seed"])
    'train.lr'
    """

    section, _, last = key.rpartition(".")

    def likeness(candidate: str) -> float:
        its_section, _, its_last = candidate.rpartition(".")
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        part = difflib.SequenceMatcher(None, last, its_last).ratio()
        return part + 0.01 if section == its_section else max(whole, part)

    best = max(keys, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.65 else None


def _load(path: Path) -> Mapping[Any, Any]:
    """The file's mapping, its interpolations unresolved."""
    if path.is_dir():
        raise ConfigError(f"the recipe {str(path)!r} is a directory; give the YAML file.")
    if not path.is_file():
        raise ConfigError(
            f"there is no recipe {str(path)!r}. Give the path of a YAML file, for example one of examples/."
        )
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: {where}not valid YAML: {error.problem}.") from error
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe: {_first_line(error)}.") from error
    if content == {} or content is None:
        raise ConfigError(f"{path}: the recipe is empty. It needs at least `model` and `output_dir`.")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values; got a {type(content).__name__}.")
    return content


def _flatten(content: Mapping[Any, Any], schema: type, source: str) -> _Flat:
    """The file's settings by dotted key; a section that is given as null has none."""
    nested, flat = sections(schema), {}
    for key, value in content.items():
        if key in nested and "." not in key:
            flat.update(_flatten_section(key, value, schema, source))
        elif key in leaf_types(schema) and "." not in key:
            flat[key] = (value, source)
        else:
            _refuse_unknown(str(key), schema, source)
    return flat


def _flatten_section(name: str, value: Any, schema: type, source: str) -> _Flat:
    """The settings of one section: a mapping, null, or a plain word that stands for its name or kind."""
    section = sections(schema)[name]
    selector = _selector(section)
    if value is None:
        return {}
    if isinstance(value, str) and selector is not None:
        return {f"{name}.{selector}": (value, source)}
    keys = [field.name for field in dataclasses.fields(section)]
    if not isinstance(value, dict):
        word = f", or a plain word for {name}.{selector}" if selector else ""
        raise ConfigError(
            f"{source}: {name} is a section with the keys {', '.join(keys)}{word}; got {value!r}. "
            f"Write its settings as `key: value` below it, or as {name}.KEY=VALUE on the command line."
        )
    flat: _Flat = {}
    for key, item in value.items():
        if key not in keys:
            _refuse_unknown(f"{name}.{key}", schema, source)
        inside = f"{name}.{key}" in sections(schema)
        flat.update(
            _flatten_section(f"{name}.{key}", item, schema, source) if inside else {f"{name}.{key}": (item, source)}
        )
    return flat


def _apply_overrides(flat: _Flat, schema: type, overrides: Sequence[str]) -> None:
    """Puts the settings of the command line in the place of the file's."""
    types, nested = leaf_types(schema), sections(schema)
    given: list[str] = []
    for text in overrides:
        key, equals, raw = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise ConfigError(f"{COMMAND_LINE}: {text!r} is not a setting. Write key=value, for example train.lr=1e-5.")
        if key not in types and key not in nested:
            _refuse_unknown(key, schema, COMMAND_LINE)
        clash = next((old for old in given if old == key or old.startswith(f"{key}.")), None)
        if clash is not None:
            raise ConfigError(
                f"{COMMAND_LINE}: {key}={raw} would undo {clash}, which was given before it. "
                + ("Give each key once." if clash == key else f"Give {key} first, or give only one of them.")
            )
        given.append(key)
        value = _parse(key, raw, types.get(key, Any))
        if key in types:
            flat[key] = (value, COMMAND_LINE)
            continue
        if not isinstance(value, dict):
            for old in [old for old in flat if old.startswith(f"{key}.")]:
                del flat[old]
        flat.update(_flatten_section(key, value, schema, COMMAND_LINE))


def _parse(key: str, raw: str, wanted: Any) -> Any:
    """The value of an override; for text that is no YAML string, such as `{problem}`, the characters themselves."""
    is_text = str in (wanted, *get_args(wanted))
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        if is_text:
            return raw
        raise ConfigError(f"{COMMAND_LINE}: {key}={raw} is not valid YAML: {_first_line(error)}.") from error
    assert isinstance(content, dict)
    value = content["value"]
    return raw if is_text and value is not None and not isinstance(value, str) else value


def _build(schema: type[_Schema], flat: _Flat) -> _Schema:
    """The dataclass of the settings; its own checks run here."""
    types = leaf_types(schema)
    for key, (value, source) in flat.items():
        if isinstance(value, bool) and bool not in (types[key], *get_args(types[key])):
            _refuse_type(key, value, types[key], source)
    try:
        merged = _merge(schema, flat)
    except OmegaConfBaseException as error:
        for key, (value, source) in flat.items():
            if not _merges(schema, {key: (value, source)}):
                _refuse_type(key, value, types[key], source, error)
        raise ConfigError(_first_line(error)) from error
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        value, source = flat.get(key, (None, "recipe"))
        raise ConfigError(f"{source}: {key}: {value!r} cannot be resolved: {_first_line(error)}.") from error


def _merge(schema: type, flat: _Flat) -> Any:
    """The typed OmegaConf node of the schema with the settings in it."""
    tree: dict[str, Any] = {}
    for key in sections(schema):
        _inside(tree, key)
    for key, (value, _) in flat.items():
        section, _, last = key.rpartition(".")
        _inside(tree, section)[last] = value
    node = OmegaConf.structured(schema)
    OmegaConf.set_readonly(node, False)  # frozen dataclasses arrive read-only
    return OmegaConf.merge(node, tree)


def _inside(tree: dict[str, Any], section: str) -> dict[str, Any]:
    """The dictionary of a section, made where it is not there; the tree itself for no section."""
    for name in section.split(".") if section else ():
        tree = tree.setdefault(name, {})
    return tree


def _merges(schema: type, flat: _Flat) -> bool:
    """Whether these settings have the schema's types."""
    try:
        _merge(schema, flat)
    except OmegaConfBaseException:
        return False
    return True


def _selector(section: type) -> str | None:
    """The field that a plain word for the whole section stands for."""
    names = {field.name for field in dataclasses.fields(section)}
    return next((name for name in _SELECTORS if name in names), None)


def _may_be_null(wanted: Any) -> bool:
    return NoneType in get_args(wanted)


def _refuse_unknown(key: str, schema: type, source: str) -> NoReturn:
    """Raises the error of a key that the schema lacks."""
    types, nested = leaf_types(schema), sections(schema)
    section = key.rpartition(".")[0]
    if key in types:
        name, _, last = key.rpartition(".")
        raise ConfigError(
            f"{source}: {key!r} is written in one piece. In a recipe write `{name}:`, and `{last}:` below it."
        )
    near = nearest_key(key, (*types, *nested))
    if near is not None and near != section:
        advice = f"Did you mean {near!r}?"
    elif section in nested:
        advice = f"The keys of {section} are {', '.join(field.name for field in dataclasses.fields(nested[section]))}."
    else:
        advice = f"The keys are {', '.join(field.name for field in dataclasses.fields(schema))}."
    raise ConfigError(f"{source}: unknown key {key!r}. {advice}")


def _refuse_type(key: str, value: Any, wanted: Any, source: str, cause: Exception | None = None) -> NoReturn:
    """Raises the error of a value that is not of its key's type."""
    plain = next(kind for kind in (wanted, *get_args(wanted)) if kind in _WANTED)
    null = ", or null" if _may_be_null(wanted) else ""
    quotes = " Put it in quotes." if plain is str else ""
    raise ConfigError(f"{source}: {key} must be {_WANTED[plain]}{null}; got {value!r}.{quotes}") from cause


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
