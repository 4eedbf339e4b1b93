"""Reads a recipe (YAML) and the `key=value` settings of a command line into a dataclass; knows no key by name.

A schema is a dataclass whose fields are plain values (str, int, float, bool, or one of them or None), sections
(dataclasses of the same kind), or tables of sections under names that the recipe chooses (`dict[str, dataclass]`).
Inside this file the settings are flat: dotted key -> (value, where it was given).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from renio_megatron.config.renamed import RENAMED
from renio_megatron.errors import ConfigError

COMMAND_LINE = "command line"
_SELECTORS = ("name", "kind")
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


def read_recipe(
    schema: type[_Schema],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    without: Collection[str] = (),
) -> tuple[_Schema, frozenset[str], frozenset[str]]:
    """The dataclass that a recipe and its overrides describe, and the keys they set.

    An override is `key=value` with a dotted key and a value in YAML; for a key that holds text it is the text, letter
    for letter, but for null and for text in YAML's quotes. A plain word for a section that has a `name` or a `kind`
    (`weighting=uniform`) starts that section afresh with it. Null for a key that cannot be null is its default.

    Args:
        schema: the dataclass to build.
        path: the YAML file; None: there is none, only overrides.
        overrides: settings that replace those of the file, in the order of the command line.
        without: dotted keys that are left out, whoever gave them.

    Returns:
        (config, explicit, given): the dotted keys with a value other than null in the file or the overrides, and of
        them those that the overrides gave.

    Raises:
        ConfigError: the file cannot be read, or a key or a value is not one of the schema's.
    """
    content = {} if path is None else _load(Path(path))
    keys = Keys(schema, _chosen_names(Keys(schema, {}), content, overrides))
    types = keys.values
    flat = _flatten(content, keys, str(path))
    _apply_overrides(flat, keys, overrides)
    flat = {key: entry for key, entry in flat.items() if key not in without}
    explicit = frozenset(key for key, (value, _) in flat.items() if value is not None)
    given = frozenset(key for key in explicit if flat[key][1] == COMMAND_LINE)
    flat = {key: entry for key, entry in flat.items() if entry[0] is not None or _may_be_null(types[key])}
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        if field.name in types and field.default is dataclasses.MISSING and field.name not in flat:
            raise ConfigError(f"{path}: {field.name} is missing. Add it, or give {field.name}=... on the command line.")
    return _build(schema, keys, flat), explicit, given


class Keys:
    """The dotted keys of a schema.

    Attributes:
        values: the type of every plain value, in the order of the fields.
        sections: what stands in every section, one before those inside it; a table's names count as its keys.
        tables: the sections whose keys are names that the recipe chooses.
        top: the keys outside of all sections, and the sections there.
    """

    def __init__(self, schema: type, names: Mapping[str, Sequence[str]]) -> None:
        """`names` are those chosen for each table, by its dotted key."""
        self.values: dict[str, Any] = {}
        self.sections: dict[str, list[str]] = {}
        self.tables: set[str] = set()
        self.top = [field.name for field in dataclasses.fields(schema)]
        self._names = names
        self._add("", schema)

    def _add(self, section: str, schema: type) -> None:
        hints = get_type_hints(schema)
        for name in (field.name for field in dataclasses.fields(schema)):
            key, hint = f"{section}{name}", hints[name]
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                self._add_section(key, hint)
            elif get_origin(hint) is dict:
                self.tables.add(key)
                self.sections[key] = list(self._names.get(key, ()))
                for chosen in self.sections[key]:
                    self._add_section(f"{key}.{chosen}", get_args(hint)[1])
            else:
                self.values[key] = hint

    def _add_section(self, key: str, schema: Any) -> None:
        self.sections[key] = [field.name for field in dataclasses.fields(schema)]
        self._add(f"{key}.", schema)

    def selector(self, section: str) -> str | None:
        """The key that a plain word for the whole section stands for."""
        names = () if section in self.tables else self.sections[section]
        return next((name for name in _SELECTORS if name in names), None)


def _chosen_names(keys: Keys, content: Mapping[Any, Any], overrides: Sequence[str]) -> dict[str, list[str]]:
    """The names that a recipe's file and its overrides give to the sections of each table, in their order."""
    found: dict[str, list[str]] = {}
    for table in keys.tables:
        inside: Any = content
        for part in table.split("."):
            inside = inside.get(part) if isinstance(inside, dict) else None
        names = [str(name) for name in inside] if isinstance(inside, dict) else []
        for text in overrides:
            key, _, raw = (part.strip() for part in text.partition("="))
            if key.startswith(f"{table}."):
                names.append(key[len(table) + 1 :].partition(".")[0])
            elif key == table and isinstance(value := _parse(key, raw, Any), dict):
                names += [str(name) for name in value]
        if with_dot := next((name for name in names if "." in name), None):
            raise ConfigError(f"{table}: {with_dot!r} cannot be a name there: dots separate keys. Choose one without.")
        found[table] = list(dict.fromkeys(names))
    return found


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
    except RecursionError as error:
        raise ConfigError(f"{path}: cannot be read as a recipe: it is nested too deeply.") from error
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe: {_first_line(error)}.") from error
    if content == {} or content is None:
        raise ConfigError(f"{path}: the recipe is empty. It needs at least `model` and `output_dir`.")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values; got a {type(content).__name__}.")
    return content


def _flatten(content: Mapping[Any, Any], keys: Keys, source: str) -> _Flat:
    """The file's settings by dotted key; a section that is given as null has none."""
    flat = {}
    for key, value in content.items():
        if key in keys.sections and "." not in key:
            flat.update(_flatten_section(key, value, keys, source))
        elif key in keys.values and "." not in key:
            flat[key] = (value, source)
        else:
            _refuse_unknown(str(key), keys, source)
    return flat


def _flatten_section(name: str, value: Any, keys: Keys, source: str) -> _Flat:
    """The settings of one section: a mapping, null, or a plain word that stands for its name or kind."""
    selector = keys.selector(name)
    if value is None:
        return {}
    if isinstance(value, str) and selector is not None:
        return {f"{name}.{selector}": (value, source)}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{source}: {name} is {_what_stands_in(name, keys)}; got {value!r}. "
            f"Write its settings as `key: value` below it, or as {name}.KEY=VALUE on the command line."
        )
    flat: _Flat = {}
    for key, item in value.items():
        if str(key) not in keys.sections[name]:
            _refuse_unknown(f"{name}.{key}", keys, source)
        inside = f"{name}.{key}" in keys.sections
        flat.update(
            _flatten_section(f"{name}.{key}", item, keys, source) if inside else {f"{name}.{key}": (item, source)}
        )
    return flat


def _what_stands_in(section: str, keys: Keys) -> str:
    if section in keys.tables:
        return "a section whose keys are names of your choice, each a section itself"
    selector = keys.selector(section)
    word = f", or a plain word for {section}.{selector}" if selector else ""
    return f"a section with the keys {', '.join(keys.sections[section])}{word}"


def _apply_overrides(flat: _Flat, keys: Keys, overrides: Sequence[str]) -> None:
    """Puts the settings of the command line in the place of the file's."""
    types, nested = keys.values, keys.sections
    given: list[str] = []
    for text in overrides:
        key, equals, raw = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"{COMMAND_LINE}: {text!r} is not a setting. Write key=value, for example train.lr=1e-5.")
        if key not in types and key not in nested:
            _refuse_unknown(key, keys, COMMAND_LINE)
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
        value = _parse(key, raw, types.get(key, Any))
        if key in types:
            flat[key] = (value, COMMAND_LINE)
            continue
        if not isinstance(value, dict):
            for old in [old for old in flat if old.startswith(f"{key}.")]:
                del flat[old]
        flat.update(_flatten_section(key, value, keys, COMMAND_LINE))


def _parse(key: str, raw: str, wanted: Any) -> Any:
    """The value of an override: YAML, or where text is wanted the characters themselves, see `read_recipe`."""
    if str in (wanted, *get_args(wanted)) and get_origin(wanted) is not list:
        return _parse_text(raw)
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw.strip()}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{COMMAND_LINE}: {key}={raw} is not valid YAML: {_first_line(error)}.") from error
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
    r"""A value in which OmegaConf finds no interpolation: text stays what it is, also inside it, and all else.

    >>> literal("Solve ${x}$"), literal(3)
    ('Solve \\${x}$', 3)
    """
    if isinstance(value, dict):
        return {key: literal(one) for key, one in value.items()}
    if isinstance(value, list):
        return [literal(one) for one in value]
    return _INTERPOLATION.sub(lambda match: match[1] * 2 + "\\${", value) if isinstance(value, str) else value


def _build(schema: type[_Schema], keys: Keys, flat: _Flat) -> _Schema:
    """The dataclass of the settings; its own checks run here."""
    types = keys.values
    for key, (value, source) in flat.items():
        if isinstance(value, bool) and bool not in (types[key], *get_args(types[key])):
            _refuse_type(key, value, types[key], source)
    try:
        merged = _merge(schema, keys, flat)
    except OmegaConfBaseException as error:
        for key, (value, source) in flat.items():
            if not _merges(schema, keys, {key: (value, source)}):
                _refuse_type(key, value, types[key], source, error)
        raise ConfigError(_first_line(error)) from error
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        value, source = flat.get(key, (None, "recipe"))
        raise ConfigError(f"{source}: {key}: {value!r} cannot be resolved: {_first_line(error)}.") from error


def _merge(schema: type, keys: Keys, flat: _Flat) -> Any:
    """The typed OmegaConf node of the schema with the settings in it."""
    tree: dict[str, Any] = {}
    for key in keys.sections:
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


def _merges(schema: type, keys: Keys, flat: _Flat) -> bool:
    """Whether these settings have the schema's types."""
    try:
        _merge(schema, keys, flat)
    except OmegaConfBaseException:
        return False
    return True


def _may_be_null(wanted: Any) -> bool:
    return NoneType in get_args(wanted)


def _refuse_unknown(key: str, keys: Keys, source: str) -> NoReturn:
    """Raises the error of a key that the schema lacks."""
    types, nested = keys.values, keys.sections
    section = key.rpartition(".")[0]
    if (new := RENAMED.get(key)) is not None and (new in types or new in nested):
        raise ConfigError(f"{source}: {key} is called {new} now. Change the name; its values are the same.")
    if key in types:
        name, _, last = key.rpartition(".")
        raise ConfigError(
            f"{source}: {key!r} is written in one piece. In a recipe write `{name}:`, and `{last}:` below it."
        )
    near = nearest_key(key, (*types, *nested))
    if near is not None and near != section:
        advice = f"Did you mean {near!r}?"
    elif section in nested:
        advice = f"The keys of {section} are {', '.join(nested[section])}."
    else:
        advice = f"The keys are {', '.join(keys.top)}."
    raise ConfigError(f"{source}: unknown key {key!r}. {advice}")


def _refuse_type(key: str, value: Any, wanted: Any, source: str, cause: Exception | None = None) -> NoReturn:
    """Raises the error of a value that is not of its key's type."""
    plain = next(kind for kind in (wanted, *get_args(wanted)) if kind in _WANTED)
    null = ", or null" if _may_be_null(wanted) else ""
    quotes = " Put it in quotes." if plain is str else ""
    raise ConfigError(f"{source}: {key} must be {_WANTED[plain]}{null}; got {value!r}.{quotes}") from cause


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
