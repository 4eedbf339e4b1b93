r"""Answers of several parts: lists, sets, tuples, intervals, inequalities, and values with names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from renio_megatron.evaluation.graders.latex import compact, split_top

_NAME = r"(?:[a-zA-Z]|\\[a-z]+)(?:_\{?[a-zA-Z0-9]+\}?|')?(?:\([a-zA-Z0-9, ]*\))?"
_NAMED = re.compile(rf"\s*(?P<name>{_NAME}|\\text\s*\{{[^{{}}]*\}}|[a-zA-Z ]{{2,30}})\s*(?:=|\\in(?![a-zA-Z]))\s*")
_AND_OR = r"(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<=[\s,])(?:and|or)(?=[\s\\]))"
_SEPARATOR = rf",\s*{_AND_OR}|{_AND_OR}|[,;]"
_UNION = r"\\cup(?![a-zA-Z])|\\text\s*\{\s*or\s*\}|(?<=\s)or(?=[\s\\])"
_COMPARISON = r"(<=?|>=?|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z]))"
_VARIABLE = re.compile(r"[a-zA-Z]|\\[a-z]+|[a-z]\([a-z]\)")
_INFINITE = {"\\infty", "+\\infty", "-\\infty", "oo", "-oo", "inf", "-inf"}
_EVERYTHING = {"\\mathbb{R}", "allrealnumbers", "allreals", "allrealx", "(-\\infty,+\\infty)"}
_NOTHING = {
    "\\emptyset", "\\{\\}", "emptyset", "theemptyset", "nosolution", "nosolutions", "norealsolution", "norealsolutions",
    "nosuchnumber", "nosuchnumbers", "nosolutionexists", "nosolutionsexist",
}  # fmt: skip
_FLIPPED = {"<": ">", "<=": ">=", "\\le": "\\ge", ">": "<", ">=": "<=", "\\ge": "\\le"}


@dataclass(frozen=True)
class Parts:
    """The parts of an answer.

    Attributes:
        kind: `list` and `set` have no order; `tuple` and `vector` have one; `union` is of intervals; `nothing` is the
            empty set.
        items: the parts, cleaned.
        brackets: those of a tuple or an interval: ``()``, ``[)``, ...
    """

    kind: str
    items: tuple[str, ...] = ()
    brackets: str = ""


Equal = Callable[[str, str], bool]
"""(expected, given) -> whether two parts are the same."""


def without_name(text: str) -> tuple[str, str | None]:
    r"""The value of an answer such as ``x = 5`` or ``x \in [0, 1]``, and its name; (text, None) where it has none.

    >>> without_name("x = 5"), without_name("f(x) = 2x"), without_name("x + y = 5"), without_name("x = 2 + 3 = 5")
    (('5', 'x'), ('2x', 'f(x)'), ('x + y = 5', None), ('5', 'x'))
    """
    match = _NAMED.match(text)
    if match is None or not text[match.end() :].strip():
        return text, None
    value = text[match.end() :]
    if any("=" in piece for piece in split_top(value, _SEPARATOR)[1:]):
        return text, None  # several values with names
    return split_top(value, "=")[-1], compact(match["name"])


def parts_of(text: str) -> Parts | None:
    r"""The parts of a cleaned answer; None where it is a single value.

    >>> parts_of("1, 2 and 3"), parts_of(r"\{2, 1\}").kind, parts_of("x + 1")
    (Parts(kind='list', items=('1', '2', '3'), brackets=''), 'set', None)
    >>> parts_of("[1, 2)"), parts_of("x < 2").items, parts_of(r"(0, 1) \cup [2, \infty)").kind
    (Parts(kind='tuple', items=('1', '2'), brackets='[)'), ('-\\infty', '2'), 'union')
    """
    text = text.strip()
    if (words := _words(text)) in _NOTHING or compact(text) in _NOTHING:
        return Parts("nothing")
    if words in _EVERYTHING or compact(text) in _EVERYTHING:
        return Parts("tuple", ("-\\infty", "\\infty"), "()")
    pieces = [without_name(piece)[0] for piece in split_top(text, _UNION)]
    if len(pieces) > 1 and all(_interval(piece, is_open=True) is not None for piece in pieces):
        return Parts("union", tuple(pieces))
    if (interval := _interval(text)) is not None:
        return interval
    if (inside := _inside(text, r"\{", r"\}")) is not None:
        return Parts("set", tuple(_with_both_signs(split_top(inside, _SEPARATOR))))
    if (inside := _inside(text, "(", ")")) is not None and len(items := split_top(inside, "[,;]")) > 1:
        return Parts("tuple", tuple(items), "()")
    if (vector := re.fullmatch(r"\\begin\{([pbvBV]?matrix)\}(.*)\\end\{\1\}", text, re.DOTALL)) is not None:
        rows = [row.strip() for row in re.split(r"\\\\", vector[2]) if row.strip()]
        if len(rows) > 1 and not any("&" in row for row in rows):
            return Parts("vector", tuple(rows))
    items = [item for item in split_top(text, _SEPARATOR) if item]
    items = _with_both_signs(items)
    return Parts("list", tuple(items)) if len(items) > 1 else None


def _words(text: str) -> str:
    """The letters of a text, without LaTeX's marks of text, in lower case."""
    return re.sub(r"\\text\s*|[{}\s.]", "", text).lower()


def _inside(text: str, begin: str, end: str) -> str | None:
    """What stands between brackets around the whole text."""
    if not (text.startswith(begin) and text.endswith(end)) or len(text) < len(begin) + len(end):
        return None
    inside, depth = text[len(begin) : -len(end)], 0
    for token in re.findall(r"\\[{}]|[()\[\]{}]", inside):
        depth += 1 if token[-1] in "([{" else -1
        if depth < 0:
            return None
    return inside if depth == 0 else None


def _with_both_signs(items: Sequence[str]) -> list[str]:
    r"""Each item with one ``\pm`` as two."""
    found = []
    for item in items:
        if len(re.findall(r"\\pm(?![a-zA-Z])", item)) == 1:
            before, after = re.split(r"\\pm(?![a-zA-Z])", item)
            found += [f"{before}+{after}" if before.strip() else after.strip(), f"{before}-{after}"]
        else:
            found.append(item)
    return found


def _interval(text: str, *, is_open: bool = False) -> Parts | None:
    """An interval or an inequality; None for anything else.

    Args:
        text: cleaned text.
        is_open: whether round brackets around finite ends are an interval, too, rather than a tuple.
    """
    text = text.strip()
    if text[:1] == "]" and text[-1:] in "[]":  # the French ]a, b[
        text = "(" + text[1:]
    if text[-1:] == "[" and text[:1] in "[(":
        text = text[:-1] + ")"
    if text[:1] in ("[", "(") and text[-1:] in ("]", ")"):
        items = split_top(text[1:-1], ",")
        brackets = text[0] + text[-1]
        is_infinite = any(compact(item) in _INFINITE for item in items)
        if len(items) == 2 and all(items) and (is_open or brackets != "()" or is_infinite):
            return Parts("tuple", tuple(items), brackets)
        return None
    return _inequality(text)


def _inequality(text: str) -> Parts | None:
    r"""The interval of ``a < x``, ``x \le b`` or ``a < x \le b``."""
    pieces = [piece.strip() for piece in re.split(_COMPARISON, text)]
    if len(pieces) == 3 and _VARIABLE.fullmatch(pieces[2]) and not _VARIABLE.fullmatch(pieces[0]):
        pieces = [pieces[2], _FLIPPED[pieces[1]], pieces[0]]
    if len(pieces) == 3 and _VARIABLE.fullmatch(pieces[0]) and pieces[2]:
        is_closed = pieces[1] not in ("<", ">")
        if pieces[1] in ("<", "<=", "\\le"):
            return Parts("tuple", ("-\\infty", pieces[2]), "(]" if is_closed else "()")
        return Parts("tuple", (pieces[2], "\\infty"), "[)" if is_closed else "()")
    if len(pieces) == 5 and _VARIABLE.fullmatch(pieces[2]) and pieces[0] and pieces[4]:
        if pieces[1] in (">", ">=", "\\ge") and pieces[3] in (">", ">=", "\\ge"):
            pieces = [pieces[4], _FLIPPED[pieces[3]], pieces[2], _FLIPPED[pieces[1]], pieces[0]]
        if pieces[1] in ("<", "<=", "\\le") and pieces[3] in ("<", "<=", "\\le"):
            brackets = ("(" if pieces[1] == "<" else "[") + (")" if pieces[3] == "<" else "]")
            return Parts("tuple", (pieces[0], pieces[4]), brackets)
    return None


def same_parts(expected: Parts, given: Parts, equal: Equal) -> bool:
    """Whether two answers have the same parts.

    A list and a set are the same where their elements are. A list without brackets is taken for a tuple where the other
    side is one, in its order.

    Args:
        expected, given: the parts.
        equal: compares two parts.
    """
    if len(expected.items) != len(given.items):
        return False
    kinds = {expected.kind, given.kind}
    if kinds == {"nothing"}:
        return True
    if kinds == {"union"}:
        return _same_elements(expected.items, given.items, equal)
    if kinds <= {"list", "set"}:
        return _same_named(expected.items, given.items, equal) or _same_elements(expected.items, given.items, equal)
    if kinds in ({"tuple"}, {"vector"}, {"tuple", "vector"}, {"tuple", "list"}, {"vector", "list"}):
        if kinds != {"tuple"} and {expected.brackets, given.brackets} & {"[)", "(]", "[]"}:
            return False
        if kinds == {"tuple"} and expected.brackets != given.brackets:
            return False
        return all(map(equal, expected.items, given.items))
    return False


def _same_named(expected: Sequence[str], given: Sequence[str], equal: Equal) -> bool:
    """Whether values that all have names on both sides are the same by name."""
    tables = [{name: value for value, name in map(without_name, items) if name} for items in (expected, given)]
    if any(len(table) != len(expected) for table in tables) or tables[0].keys() != tables[1].keys():
        return False
    return all(equal(value, tables[1][name]) for name, value in tables[0].items())


def _same_elements(expected: Sequence[str], given: Sequence[str], equal: Equal) -> bool:
    """Whether each expected element is one of the given, one to one."""
    names = [[without_name(item)[1] for item in items] for items in (expected, given)]
    if all(all(one) and len(set(one)) == len(one) for one in names) and set(names[0]) == set(names[1]):
        return False  # which `_same_named` has compared
    left = list(given)
    for item in expected:
        found = next((index for index, other in enumerate(left) if equal(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True
