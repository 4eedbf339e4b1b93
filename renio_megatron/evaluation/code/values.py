"""Values of Python as typed JSON: what a program returned, on its way to the judge, and inputs on their way to it.

`null`, booleans, integers below 2**63, finite floats and texts are JSON's own. Everything else is an array whose first
item is a tag: `i` integer (hexadecimal), `f` nan and infinities, `c` complex, `u` text with surrogates, `b` bytes,
`l` list, `t` tuple, `s` set, `z` frozenset, `d` dict (keys and values in turn), `r` range, `h` digest of a long text,
`p` digest of a large value, `o` anything else.

The harness's text begins with this file, so that it uses the standard library only, and no other file of the package.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from json.encoder import encode_basestring_ascii
from typing import Any

MAX_DEPTH = 100
MAX_CHARS = 1 << 24
LONG_TEXT = 1 << 14
_SMALL = 1 << 63
_MAX_INT_TEXT = 20  # longer integers are hexadecimal: reading decimal digits takes the square of their number
_LONG_INT = re.compile(r"[0-9]{21}")
_MAX_SAME_HASH = 32  # a set whose members were made to collide would take the square of their number
_MANY, _SLICE = 50, 1000  # items from which on they are written at once, and how many at once
_ODD_FLOATS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
_ITERABLES: dict[type, str] = {list: "l", tuple: "t", set: "s", frozenset: "z"}
_SIZED = frozenset({*_ITERABLES, str, bytes, bytearray, dict})
_BASES: tuple[Any, ...] = (int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict)
_SCALARS = frozenset({type(None), bool, int, float, str})
# A metaclass may hide the real bases and name of a class.
_mro_of = type.__dict__["__mro__"].__get__
_sha256 = hashlib.sha256
_name_of = type.__dict__["__name__"].__get__


class BadValueError(ValueError):
    """A text that is not a value, or one beyond the bounds of depth and size."""


class _TooLargeError(BadValueError):
    pass


class Opaque:
    """A value that has no typed form: it is unequal to everything, but not None."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        """Its type's name in brackets."""
        return f"<{self.kind}>"


class Large:
    """A value that is too large to be sent: its type, length, and the digest of the beginning of its typed JSON.

    Two are equal where all three are, whatever comes behind.
    """

    def __init__(self, summary: str) -> None:
        self.summary = summary

    def __eq__(self, other: object) -> bool:
        """Whether the other has the same summary."""
        return isinstance(other, Large) and self.summary == other.summary

    def __hash__(self) -> int:
        """Of the summary."""
        return hash(self.summary)

    def __repr__(self) -> str:
        """Type and length in brackets."""
        return f"<large {self.summary.rpartition(' ')[0]}>"


class LongText:
    """A text of which only the digest was sent: some right answers are texts of megabytes. It equals that text."""

    def __init__(self, digest: str) -> None:
        self.digest = digest

    def __eq__(self, other: object) -> bool:
        """Whether the other is the same text, or the digest of it."""
        return self.digest == (_digest_of(other) if isinstance(other, str) else getattr(other, "digest", None))

    def __hash__(self) -> int:
        """Of the digest: not that of the text, which nobody has."""
        return hash(self.digest)

    def __repr__(self) -> str:
        """The beginning of the digest in brackets."""
        return f"<long text {self.digest[:12]}>"


def _digest_of(text: str) -> str:
    return _sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def encode(value: Any, max_chars: float = float("inf"), long_text: float = float("inf")) -> str:
    """Typed JSON of a value, ASCII on one line; an opaque value where it is too deep, or fails on the way.

    Subclasses are written as the builtin type below them, and by that type's own methods, whatever they override;
    scalars of numpy as numbers. Texts above `long_text` characters become digests, and
    so do values that take more than `max_chars`.

    >>> encode([1, (2.5, None)]), encode({1: {2}}), encode(x for x in "a")
    ('["l",1,["t",2.5,null]]', '["d",1,["s",2]]', '["o","generator"]')
    """
    parts: list[str] = []
    left = max_chars

    def write(text: str) -> None:
        nonlocal left
        if len(text) > left:
            parts.append(text[: int(left)])  # equal values are cut at the same place, however they were written
            raise _TooLargeError
        left -= len(text)
        parts.append(text)

    try:
        _write_value(value, MAX_DEPTH, write, long_text)
    except _TooLargeError:
        size = len(value) if type(value) in _SIZED else 0
        return f'["p","{_name_of(type(value))} {size} {_digest_of("".join(parts))}"]'
    except BadValueError as error:
        return _opaque(f"{_name_of(type(value))} that is {error}")
    except Exception as error:
        return _opaque(f"{_name_of(type(value))} that raises {_name_of(type(error))}")
    return "".join(parts)


def _opaque(kind: str) -> str:
    return f'["o",{encode_basestring_ascii(kind[:80])}]'


def _write_value(value: Any, depth: int, write: Callable[[str], None], long_text: float) -> None:
    if depth == 0:
        raise BadValueError("too deep")
    kind = type(value)
    if value is None:
        write("null")
    elif kind is bool:
        write("true" if value else "false")
    elif kind is int:
        write(repr(value) if -_SMALL < value < _SMALL else f'["i","{value:x}"]')
    elif kind is float:
        write(repr(value) if value - value == 0 else f'["f","{value!r}"]')
    elif kind is str:
        write(_text(value) if len(value) <= long_text else f'["h","{_digest_of(value)}"]')
    elif kind in _ITERABLES:
        write(f'["{_ITERABLES[kind]}"')
        _write_items(value, depth - 1, write, long_text)
        write("]")
    elif kind is dict:
        write('["d"')
        for key, item in value.items():
            write(",")
            _write_value(key, depth - 1, write, long_text)
            write(",")
            _write_value(item, depth - 1, write, long_text)
        write("]")
    else:
        _write_rare(value, kind, depth, write, long_text)


def _write_rare(value: Any, kind: type, depth: int, write: Callable[[str], None], long_text: float) -> None:
    if kind is complex:
        write('["c",')
        _write_value(value.real, depth, write, long_text)
        write(",")
        _write_value(value.imag, depth, write, long_text)
        write("]")
    elif kind is bytes or kind is bytearray:
        write(f'["b","{value.hex()}"]')
    elif kind is range:
        write('["r"')
        for number in (value.start, value.stop, value.step):
            write(",")
            _write_value(number, depth, write, long_text)
        write("]")
    elif kind is LongText:
        write(f'["h","{value.digest}"]')
    else:
        plain = _plain(value, kind)
        if plain is None:
            write(_opaque(_name_of(kind)))
        else:
            _write_value(plain, depth, write, long_text)


def _write_items(value: Any, depth: int, write: Callable[[str], None], long_text: float) -> None:
    items = value if type(value) in (list, tuple) else tuple(value)
    for start in range(0, len(items), _SLICE):
        part = items[start : start + _SLICE]
        text = _many(part, long_text) if len(part) > _MANY else None
        if text is not None:
            write(text)
            continue
        for item in part:
            write(",")
            _write_value(item, depth, write, long_text)


def _many(values: Any, long_text: float) -> str | None:
    """What `_write_value` writes for many numbers, or many texts, faster; None where they are not the ordinary ones."""
    kinds = set(map(type, values))
    if kinds == {str}:
        if max(map(len, values)) > min(long_text, LONG_TEXT) or not "".join(values).isascii():
            return None
        return "," + ",".join(map(encode_basestring_ascii, values))
    if not kinds <= {int, float}:
        return None
    text = ",".join(map(repr, values))
    if "n" in text or not -_SMALL < min(values) <= max(values) < _SMALL:  # nan, inf, and long integers
        return None
    return "," + text


def _text(value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON would join two surrogates that stand side by side
            return f'["u","{value.encode("utf-8", "surrogatepass").hex()}"]'
    return encode_basestring_ascii(value)


def _plain(value: Any, kind: type) -> Any:
    """The same value in a builtin type; None where there is none."""
    bases = _mro_of(kind)
    numpy_scalar = getattr(sys.modules.get("numpy"), "generic", None)
    base = next((base for base in _BASES if base in bases and base is not kind), None)
    if base is int:
        return int.__index__(value)
    if base is float:
        return float.__float__(value)
    if base is complex:
        return complex(*(complex.__dict__[part].__get__(value) for part in ("real", "imag")))
    if base is str:
        return str.__str__(value)
    if base is bytes or base is bytearray:
        return bytes(base.__getitem__(value, slice(None)))
    if base is dict:
        return dict(dict.items(value))
    if base is not None:
        return base(base.__iter__(value))
    if numpy_scalar is not None and numpy_scalar in bases:
        item = value.item()
        return item if type(item) in (bool, int, float, complex, str, bytes) else None
    return None


def parse(text: str | bytes) -> Any:
    """The JSON tree of a text, of arrays, texts, numbers and objects.

    Raises:
        BadValueError: it is not ASCII, not JSON, too deep, or holds a long decimal integer.
    """
    try:
        ascii_text = text if isinstance(text, str) else text.decode("ascii")
        # The function costs more than the rest of the parser: it is called where a long integer may be.
        parse_int = _parse_int if _LONG_INT.search(ascii_text) else None
        return json.loads(ascii_text, parse_int=parse_int, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadValueError(f"not typed JSON: {error}") from None


def _parse_int(text: str) -> int:
    if len(text) > _MAX_INT_TEXT:
        raise BadValueError("a long decimal integer")
    return int(text)


def _refuse(text: str) -> Any:
    raise BadValueError(f"the constant {text}")


def build(tree: Any, depth: int = MAX_DEPTH + 2) -> Any:
    """The value of a typed JSON tree: a new one at each call, without any object of the tree that can be changed.

    >>> build(["t", 1, ["l", None]]), build(["i", "ff"]), build(["r", 0, 6, 2])
    ((1, [None]), 255, range(0, 6, 2))

    Raises:
        BadValueError: the tree is not typed JSON or deeper than `depth`, or members of a set were made to collide.
    """
    if type(tree) in _SCALARS:
        return tree
    if not isinstance(tree, list) or not tree or not isinstance(tree[0], str):
        raise BadValueError("not typed JSON")
    if depth == 0:
        raise BadValueError("too deep")
    tag, rest = tree[0], tree[1:]  # a new list
    if tag == "l" and _SCALARS.issuperset(map(type, rest)):
        return rest
    if tag in _BUILT_OF_VALUES:
        return _BUILT_OF_VALUES[tag]([build(item, depth - 1) for item in rest])
    if tag in _BUILT_OF_TEXT and len(rest) == 1 and isinstance(rest[0], str):
        try:
            return _BUILT_OF_TEXT[tag](rest[0])
        except (ValueError, KeyError) as error:
            raise BadValueError(f"not a value of tag {tag!r}") from error
    raise BadValueError(f"not a value of tag {tag[:8]!r}")


def checked_set(items: Iterable[Any]) -> set[Any]:
    """The items as a set, in time that grows with their number.

    Raises:
        BadValueError: an item has no hash, or many have the same.
    """
    items = list(items)
    _check_hashes(items)
    return set(items)


def _check_hashes(items: list[Any]) -> None:
    counts: dict[int, int] = {}
    seen: dict[int, Any] = {}
    for item in items:
        try:
            key = hash(item)
        except TypeError:
            raise BadValueError("a member that has no hash") from None
        # Equal items do no harm: each finds its equal at once.
        if key in seen and (seen[key] is item or seen[key] == item):
            continue
        seen[key] = item
        counts[key] = counts.get(key, 0) + 1
        if counts[key] > _MAX_SAME_HASH:
            raise BadValueError("members that collide")


def _dict(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise BadValueError("a key without a value")
    _check_hashes(items[::2])
    return dict(zip(items[::2], items[1::2], strict=True))


def _complex(items: list[Any]) -> complex:
    if len(items) != 2 or any(type(item) is not float for item in items):
        raise BadValueError("not a complex number")
    return complex(*items)


def _range(items: list[Any]) -> range:
    if len(items) != 3 or any(type(item) is not int for item in items) or not items[2]:
        raise BadValueError("not a range")
    return range(*items)


_BUILT_OF_VALUES: dict[str, Callable[[list[Any]], Any]] = {
    "l": list,
    "t": tuple,
    "s": checked_set,
    "z": lambda items: frozenset(checked_set(items)),
    "d": _dict,
    "c": _complex,
    "r": _range,
}
_BUILT_OF_TEXT: dict[str, Callable[[str], Any]] = {
    "i": lambda text: int(text, 16),
    "f": lambda text: _ODD_FLOATS[text],
    "u": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "b": bytes.fromhex,
    "h": LongText,
    "p": Large,
    "o": Opaque,
}
