"""Settings of a recipe and its command line in order, flat: dotted key -> (value, where it was given)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from renio_megatron.config.keys import Keys, refuse_unknown
from renio_megatron.config.places import Place, is_tagged, place_of
from renio_megatron.errors import ConfigError


class FlatSettings:
    """Settings in the order in which they were given.

    A mapping adds to the section that is there. A word, a list or null in place of a section replaces it.

    Attributes:
        values: dotted key -> (value, where it was given), including keys that only another tag has.
        chosen: the sections of tables and lists; they exist even where nothing is set in them.
        sources: where settings were given, in order.
        written: what stands in the recipe for a key that was put there instead of it, for messages.
    """

    def __init__(self, schema: type) -> None:
        """Starts with none of `schema`'s keys set."""
        self.schema = schema
        self.values: dict[str, tuple[Any, str]] = {}
        self.chosen: dict[str, None] = {}
        self.sources: dict[str, None] = {}
        self.written: dict[str, str] = {}

    def put(self, key: str, value: Any, source: str) -> None:
        """Sets a key, or the whole recipe for an empty key, to the value that `source` gives.

        Raises:
            ConfigError: there is no such key, or it cannot hold a value of this kind.
        """
        self.sources[source] = None
        place = place_of(self.schema, key) if key else Place("section", self.schema, "")
        if place is None:
            refuse_unknown(key, self.keys(), source)
        for end, dot in enumerate(key):
            if dot == "." and self._is_chosen(key[:end]):
                self.chosen[key[:end]] = None
        self._put(place, key, value, source)

    def without(self, keys: Collection[str]) -> None:
        """Removes values, and sections of a table or a list that are empty afterwards."""
        emptied = {key.rpartition(".")[0] for key in keys & self.values.keys()}
        for key in keys:
            self.values.pop(key, None)
        for section in emptied & self.chosen.keys():
            if not any(key.startswith(f"{section}.") for key in self.values):
                del self.chosen[section]

    def keys(self) -> Keys:
        """The keys that exist under these settings."""
        return Keys(self.schema, self.tree())

    def tree(self) -> dict[str, Any]:
        """The settings as nested mappings."""
        tree: dict[str, Any] = {}
        for key in self.chosen:
            _inside(tree, key.split("."))
        for key, (value, _) in self.values.items():
            *path, last = key.split(".")
            _inside(tree, path)[last] = value
        return tree

    def _put(self, place: Place, key: str, value: Any, source: str) -> None:
        if self._is_chosen(key):
            self.chosen[key] = None
        if place.kind == "value":
            self.values[key] = (value, source)
        elif isinstance(value, Mapping):
            for name, one in value.items():
                self._put_inside(place, key, str(name), one, source)
        else:
            self._clear(key)
            for name, one in self._instead(place, key, value, source).items():
                self._put_inside(place, key, name, one, source)

    def _put_inside(self, place: Place, key: str, name: str, value: Any, source: str) -> None:
        inner, below = place.inside(name), f"{key}.{name}" if key else name
        if place.kind == "table" and "." in name:
            raise ConfigError(f"{key}: {name!r} cannot be a name there: dots separate keys. Choose one without.")
        if inner is None:
            refuse_unknown(below, self.keys(), source)
        self._put(inner, below, value, source)

    def _instead(self, place: Place, key: str, value: Any, source: str) -> Mapping[str, Any]:
        """The settings, by the names inside, that a value other than a mapping gives in place of a section."""
        tagged = place.hint if place.kind == "section" and is_tagged(place.hint) else None
        if value is None:
            return {}
        if isinstance(value, list) and place.kind == "list":
            return {str(number): one for number, one in enumerate(value)}
        if isinstance(value, list) and tagged is not None and tagged.OF_LIST:
            return {tagged.TAG: tagged.OF_LIST[0], tagged.OF_LIST[1]: value}
        if isinstance(value, str) and tagged is not None:
            return {tagged.TAG: value}
        raise ConfigError(
            f"{source}: {key} is {self._what_stands_in(key, place)}; got {value!r}. "
            f"Write its settings as `key: value` below it, or as {key}.KEY=VALUE on the command line."
        )

    def _what_stands_in(self, key: str, place: Place) -> str:
        if place.kind == "table":
            return "a section whose keys are names of your choice, each a section itself"
        if place.kind == "list":
            return "a list of sections"
        word = f", or a plain word for {key}.{place.hint.TAG}" if is_tagged(place.hint) else ""
        return f"a section with the keys {', '.join(self.keys().sections.get(key, []))}{word}"

    def _is_chosen(self, key: str) -> bool:
        around = place_of(self.schema, key.rpartition(".")[0])
        return around is not None and around.kind in ("table", "list")

    def _clear(self, key: str) -> None:
        for settings in (self.values, self.chosen):
            for old in [old for old in settings if old.startswith(f"{key}.")]:
                del settings[old]


def _inside(tree: dict[str, Any], path: list[str]) -> dict[str, Any]:
    for name in path:
        tree = tree.setdefault(name, {})
    return tree
