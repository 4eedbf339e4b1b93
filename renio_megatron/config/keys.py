"""The dotted keys that one recipe may have, from its schema and from the classes that its tags pick."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from renio_megatron.config.foreign_names import absent, foreign
from renio_megatron.config.places import Place, is_tagged, keys_of, place_of, place_of_field
from renio_megatron.config.renamed import RENAMED
from renio_megatron.errors import ConfigError


class Keys:
    """The dotted keys of a recipe.

    Attributes:
        values: the type of every plain value, in the order of the fields.
        sections: the contents of every section, one before those inside it; the names of a table's sections and the
            numbers of a list's count as its keys.
        schemas, places: for every section except tables and lists, its class and the name of the field that it is in.
        tables, lists: the sections whose keys are names that the recipe chooses, and those whose keys are numbers.
        tags: (key that picks the class, the class picked) of sections that have such a key.
        top: the keys outside of all sections, and the sections there.
    """

    def __init__(self, schema: type, tree: Mapping[str, Any] | None = None) -> None:
        """`tree` holds the recipe's settings, with sections as mappings.

        Raises:
            ConfigError: a tag that picks nothing, or a list with a gap.
        """
        self.values: dict[str, Any] = {}
        self.sections: dict[str, list[str]] = {}
        self.schemas: dict[str, type] = {"": schema}
        self.places: dict[str, str] = {"": ""}
        self.tables: set[str] = set()
        self.lists: set[str] = set()
        self.tags: dict[str, tuple[str, str]] = {}
        self.top = keys_of(schema, "")
        self._tree = tree or {}
        self._add("", schema, "", self._tree)

    def _add(self, section: str, schema: type, field: str, inside: Mapping[str, Any]) -> None:
        for name in keys_of(schema, field):
            key, place, below = f"{section}{name}", place_of_field(schema, name), inside.get(name)
            if place.kind == "value":
                self.values[key] = place.hint
            elif place.kind == "section":
                self._add_section(key, place, as_tree(below))
            else:
                (self.tables if place.kind == "table" else self.lists).add(key)
                chosen = as_tree(below)
                self.sections[key] = list(chosen) if place.kind == "table" else _numbers(key, chosen)
                for one in self.sections[key]:
                    self._add_section(f"{key}.{one}", Place("section", place.hint, name), as_tree(chosen[one]))

    def _add_section(self, key: str, place: Place, inside: Mapping[str, Any]) -> None:
        schema = place.hint
        if is_tagged(schema):
            tag = inside.get(schema.TAG)
            tag = schema.default_tag() if tag is None else self._resolved(f"{key}.{schema.TAG}", tag)
            self.tags[key] = (schema.TAG, tag)
            schema = schema.variant(tag, key)
        self.schemas[key], self.places[key] = schema, place.field
        self.sections[key] = keys_of(schema, place.field)
        self._add(f"{key}.", schema, place.field, inside)

    def _resolved(self, key: str, tag: Any) -> str:
        """A tag as text; an interpolation is resolved."""
        if isinstance(tag, str) and "${" in tag:
            try:
                tag = OmegaConf.select(OmegaConf.create(dict(self._tree)), key)
            except OmegaConfBaseException as error:
                raise ConfigError(f"{key}: {tag!r} cannot be resolved: {first_line(error)}.") from error
        if not isinstance(tag, str):
            raise ConfigError(f"{key} must be text; got {tag!r}.")
        return tag

    def misplaced(self, key: str) -> str | None:
        """Why a key is not valid here although it would be with another tag; None where it is never valid."""
        section = key
        while section:
            section, _, name = section.rpartition(".")
            if section in self.sections:
                break
        if section not in self.tags or name in self.sections[section]:
            return None
        tag, picked = self.tags[section]
        schema: Any = self.schemas[section]
        others = [one for one in schema.VARIANTS if name in keys_of(schema.variant(one), self.places[section])]
        return f"{section}.{tag} is {picked}, not {listed(others)}" if others else None


def as_recipe(settings: Any, place: str = "") -> dict[str, Any]:
    """Settings as nested mappings by key, in the order of the fields, as a recipe holds them; lists stay lists."""
    found: dict[str, Any] = {}
    for name in keys_of(type(settings), place):
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            value = as_recipe(value, name)
        elif isinstance(value, Mapping):
            value = {key: as_recipe(one, name) for key, one in value.items()}
        elif isinstance(value, tuple):
            value = [as_recipe(one, name) for one in value]
        found[name] = value
    return found


def as_tree(below: Any) -> Mapping[str, Any]:
    """Contents of a section by key, or of a list by number; empty for anything else."""
    if isinstance(below, list):
        return {str(number): value for number, value in enumerate(below)}
    return below if isinstance(below, Mapping) else {}


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """The valid key that a wrong one most likely stands for; None where no key is similar.

    Keys are compared by their last part or, in different sections, as a whole; so a key in the wrong section is
    found, and a common section alone does not count.

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


def refuse_unknown(key: str, keys: Keys, source: str) -> NoReturn:
    """Raises the error of a key that no schema has."""
    values, sections = keys.values, keys.sections
    section, _, last = key.rpartition(".")
    new = _renamed(key, keys)
    if new is not None and (new in values or new in sections):
        raise ConfigError(f"{source}: {key} is called {new} now. Change the name; its values are the same.")
    if key in values:
        raise ConfigError(
            f"{source}: {key!r} is written in one piece. In a recipe write `{section}:`, and `{last}:` below it."
        )
    if (because := absent(key)) is not None:
        raise ConfigError(f"{source}: unknown key {key!r}. It has no counterpart here: {because}")
    known = foreign(key, lambda one: place_of(keys.schemas[""], one) is not None)
    if known is not None and (known[0] in values or known[0].partition(".")[0] in sections):
        note = f" ({known[1]})" if known[1] else ""
        raise ConfigError(f"{source}: unknown key {key!r}. Its name here is {known[0]}{note}.")
    near = nearest_key(key, (*values, *sections)) if last else None
    if near is not None and near != section:
        advice = f"Did you mean {near!r}?"
    elif section in sections:
        advice = f"The keys of {section} are {', '.join(sections[section])}."
    else:
        advice = f"The keys are {', '.join(keys.top)}."
    raise ConfigError(f"{source}: unknown key {key!r}. {advice}")


def _renamed(key: str, keys: Keys) -> str | None:
    """The new name of a key, also for a section that is nested elsewhere, as in a list."""
    section, _, last = key.rpartition(".")
    home = getattr(keys.schemas.get(section), "SECTION", section)
    new = RENAMED.get(f"{home}.{last}" if home else last)
    return None if new is None else f"{section}{new.removeprefix(home)}"


def _numbers(section: str, chosen: Iterable[str]) -> list[str]:
    """The keys of a list in their order; raises `ConfigError` where they are not 0, 1, 2 and so on."""
    names = list(chosen)
    for name in names:
        if name not in (wanted := [str(number) for number in range(len(names))]):
            others = len(names) - 1
            has = "is the only entry, and must be 0" if not others else f"stands beside {others} others"
            raise ConfigError(
                f"{section}.{name}: {section} is a list, whose entries are numbered from 0 on without a gap; {name} "
                f"{has}. Give {', '.join(wanted)}."
            )
    return sorted(names, key=int)


def first_line(error: Exception) -> str:
    """The first line of a message, without its final period."""
    return str(error).partition("\n")[0].rstrip(".")


def listed(words: Sequence[str]) -> str:
    """Words joined as an enumeration in a sentence.

    >>> listed(["ema"]), listed(["renio", "length", "ema"])
    ('ema', 'renio, length or ema')
    """
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
