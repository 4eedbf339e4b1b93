"""Reader of a recipe (YAML) and of `key=value` settings into a dataclass; it knows no key by name.

`keys` defines which keys there are. Inside this file settings are flat: dotted key -> (value, where it was given).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Generic, NoReturn, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from renio_megatron.config.flat import FlatSettings
from renio_megatron.config.inheritance import BASE, files_of
from renio_megatron.config.keys import Keys, first_line, refuse_unknown
from renio_megatron.config.places import place_of
from renio_megatron.errors import ConfigError

COMMAND_LINE = "command line"
_WANTED = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: "a list of words",
    list[int]: "a list of whole numbers",
}

_INTERPOLATION = re.compile(r"(\\*)\$\{")

_Schema = TypeVar("_Schema")
_Flat = dict[str, tuple[Any, str]]


@dataclass(frozen=True)
class Read(Generic[_Schema]):
    """The result of reading a recipe and its overrides.

    Attributes:
        config: the settings.
        explicit: dotted keys with a value other than null in the file or the overrides.
        given: those of them that the overrides set.
        sources: where each of `explicit` was given.
        misplaced: keys with a value that would be valid with another tag, and why they are not valid here.
        written: what stands in the recipe for a key, where that is not the key itself.
    """

    config: _Schema
    explicit: frozenset[str]
    given: frozenset[str]
    sources: Mapping[str, str]
    misplaced: Mapping[str, str]
    written: Mapping[str, str]


def read_recipe(
    schema: type[_Schema],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    without: Collection[str] = (),
    expand: Callable[[FlatSettings], None] = lambda settings: None,
) -> Read[_Schema]:
    """The dataclass that a recipe and its overrides describe, and the keys they set.

    An override is `key=value` with a dotted key and a value in YAML; for a key that holds text the value is taken
    literally, except for null and for text in YAML quotes. A plain word for a section whose class is picked by a key
    (`weighting=uniform`) resets that section to it. Null for a key that cannot be null means its default.

    Args:
        schema: the dataclass to build.
        path: the YAML file, with the bases that it names; None: there is none, only overrides.
        overrides: settings that replace those of the file, in the order of the command line.
        without: dotted keys that are left out, from the file and from the overrides.
        expand: replaces settings that stand for others, when all are known.

    Raises:
        ConfigError: the file cannot be read, or a key or a value is not one of the schema's.
    """
    files = [] if path is None else files_of(Path(path))
    return read_files(schema, files, overrides, without=without, expand=expand)


def read_files(
    schema: type[_Schema],
    files: Sequence[tuple[str, Mapping[Any, Any]]],
    overrides: Sequence[str] = (),
    *,
    without: Collection[str] = (),
    expand: Callable[[FlatSettings], None] = lambda settings: None,
) -> Read[_Schema]:
    """As `read_recipe`, of files that are read already: each one's name and settings, a later one on top."""
    settings = FlatSettings(schema)
    for name, content in files:
        settings.put("", content, name)
    _apply_overrides(settings, overrides)
    expand(settings)
    settings.without(without)
    keys, flat = settings.keys(), settings.values
    explicit = frozenset(key for key, (value, _) in flat.items() if value is not None)
    given = frozenset(key for key in explicit if flat[key][1] == COMMAND_LINE)
    sources = {key: flat[key][1] for key in explicit}
    misplaced = {}
    for key in [key for key in flat if key not in keys.values]:
        if (because := keys.misplaced(key)) is None:
            refuse_unknown(key, keys, flat[key][1])
        if key in explicit:
            misplaced[key] = because
        del flat[key]
    flat = {key: entry for key, entry in flat.items() if entry[0] is not None or _may_be_null(keys.values[key])}
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        if field.name in keys.values and field.default is dataclasses.MISSING and field.name not in flat:
            raise ConfigError(
                f"{files[-1][0] if files else COMMAND_LINE}: {field.name} is missing. Add it, or give {field.name}=... "
                "on the command line."
            )
    try:
        config = _build(keys, flat)
    except ConfigError as error:
        put = next((key for key in settings.written if re.match(rf"{re.escape(key)}\b", str(error))), None)
        if put is None:
            raise
        raise ConfigError(str(error).replace(put, settings.written[put], 1)) from error
    return Read(config, explicit, given, sources, misplaced, settings.written)


def _apply_overrides(settings: FlatSettings, overrides: Sequence[str]) -> None:
    """Overrides the file's settings with those of the command line."""
    given: list[str] = []
    for text in overrides:
        key, equals, raw = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"{COMMAND_LINE}: {text!r} is not a setting. Write key=value, for example train.lr=1e-5.")
        if key == BASE and settings.sources:
            raise ConfigError(
                f"{COMMAND_LINE}: {BASE} is a key of recipe files, not of the command line. Write a recipe with "
                f"`{BASE}: [{next(reversed(settings.sources))}, {raw.strip() or 'FILE'}]`, and start that one."
            )
        if (place := place_of(settings.schema, key)) is None:
            refuse_unknown(key, settings.keys(), COMMAND_LINE)
        if not raw.strip():
            raise ConfigError(
                f"{COMMAND_LINE}: {key}= has no value. Write {key}=null for its default, "
                f"or {key}=\"''\" for empty text."
            )
        clash = next((old for old in given if old == key or old.startswith(f"{key}.")), None)
        if clash is not None:
            raise ConfigError(
                f"{COMMAND_LINE}: {key}={raw} would undo {clash}, which was given before it. "
                + ("Give each key once." if clash == key else f"Give {key} first, or give only one of them.")
            )
        given.append(key)
        settings.put(key, _parse(key, raw, place.hint if place.kind == "value" else Any), COMMAND_LINE)


def _parse(key: str, raw: str, wanted: Any) -> Any:
    """The value of an override: YAML, or for keys that hold text the characters themselves; see `read_recipe`."""
    if str in (wanted, *get_args(wanted)) and get_origin(wanted) is not list:
        return _parse_text(raw)
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw.strip()}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{COMMAND_LINE}: {key}={raw} is not valid YAML: {first_line(error)}.") from error
    assert isinstance(content, dict)
    value = content["value"]
    return literal(value) if wanted == list[str] | None else value


def _parse_text(raw: str) -> str | None:
    """Null, text in YAML's quotes, or the characters themselves."""
    bare = raw.strip()
    if bare == "null":
        return None
    if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\"":
        try:
            content = yaml.safe_load(bare)
        except yaml.YAMLError:  # two texts in quotes, and something between them
            content = None
        if isinstance(content, str):
            return literal(content)
    return literal(raw)


def literal(value: Any) -> Any:
    r"""A value with text escaped, also in nested containers, so that OmegaConf finds no interpolation in it.

    >>> literal("Solve ${x}$"), literal(3)
    ('Solve \\${x}$', 3)
    """
    if isinstance(value, dict):
        return {key: literal(one) for key, one in value.items()}
    if isinstance(value, list):
        return [literal(one) for one in value]
    return _INTERPOLATION.sub(lambda match: match[1] * 2 + "\\${", value) if isinstance(value, str) else value


def _build(keys: Keys, flat: _Flat) -> Any:
    """The dataclass of the settings; its own checks run here."""
    types = keys.values
    for key, (value, source) in flat.items():
        if isinstance(value, bool) and bool not in (types[key], *get_args(types[key])):
            _refuse_type(key, value, types[key], source)
    try:
        merged = _merge(keys, flat)
    except OmegaConfBaseException as error:
        for key, (value, source) in flat.items():
            if not _merges(keys, {key: (value, source)}):
                _refuse_type(key, value, types[key], source, error)
        raise ConfigError(first_line(error)) from error
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key))
        value, source = flat.get(key, (None, "recipe"))
        raise ConfigError(f"{source}: {key}: {value!r} cannot be resolved: {first_line(error)}.") from error
    return _made(keys, values)


def _made(keys: Keys, values: Any, section: str = "") -> Any:
    """A section as an object of its class; the class's checks run here, and name the keys as the recipe has them."""
    schema, prefix = keys.schemas[section], f"{section}." if section else ""
    given: dict[str, Any] = {}
    for name in keys.sections[section] if section else keys.top:
        key = f"{prefix}{name}"
        if key in keys.lists:
            given[name] = tuple(_made(keys, one, f"{key}.{number}") for number, one in enumerate(values[name]))
        elif key in keys.tables:
            given[name] = {chosen: _made(keys, one, f"{key}.{chosen}") for chosen, one in values[name].items()}
        elif key in keys.sections:
            given[name] = _made(keys, values[name], key)
        elif values[name] != "???":  # OmegaConf's word for a field without default
            given[name] = values[name]
    try:
        return schema(**given)
    except ConfigError as error:
        own = getattr(schema, "SECTION", section)
        if own == section:
            raise
        raise ConfigError(re.sub(rf"\b{own}(?=[.:])", section, str(error))) from error


def _merge(keys: Keys, flat: _Flat, section: str = "") -> Any:
    """The typed OmegaConf node of a section, or of the whole recipe for an empty name, with the settings in it."""
    prefix = f"{section}." if section else ""
    node = OmegaConf.structured(keys.schemas[section])
    OmegaConf.set_readonly(node, False)  # frozen dataclasses arrive read-only
    for name in keys.sections[section] if section else keys.top:
        key = f"{prefix}{name}"
        if key in keys.lists:
            node[name] = tuple(_merge(keys, flat, f"{key}.{number}") for number in keys.sections[key])
        elif key in keys.tables:
            node[name] = {chosen: _merge(keys, flat, f"{key}.{chosen}") for chosen in keys.sections[key]}
        elif key in keys.sections:
            node[name] = _merge(keys, flat, key)
        elif key in flat:
            value, wanted = flat[key][0], keys.values[key]
            node[name] = (
                float(value)
                if type(value) is int and value.bit_length() < 1000 and float in (wanted, *get_args(wanted))
                else value
            )
    return node


def _merges(keys: Keys, flat: _Flat) -> bool:
    """Whether these settings have the schema's types."""
    try:
        _merge(keys, flat)
    except OmegaConfBaseException:
        return False
    return True


def _may_be_null(wanted: Any) -> bool:
    return NoneType in get_args(wanted)


def _refuse_type(key: str, value: Any, wanted: Any, source: str, cause: Exception | None = None) -> NoReturn:
    """Raises the error of a value that is not of its key's type."""
    plain = next(kind for kind in (wanted, *get_args(wanted)) if kind in _WANTED)
    null = ", or null" if _may_be_null(wanted) else ""
    quotes = " Put it in quotes." if plain is str else ""
    raise ConfigError(f"{source}: {key} must be {_WANTED[plain]}{null}; got {value!r}.{quotes}") from cause
