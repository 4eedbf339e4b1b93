r"""Where a completion's final answer stands: after its thinking, in its last ``\boxed{}``, or behind ``####``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from renio_megatron.evaluation.graders.grader import Completion

THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
)
"""Marks around a thought, as the families of models write them."""

_BOX = re.compile(r"\\f?boxed(?![a-zA-Z])|\\fbox(?![a-zA-Z])")
_PLACEHOLDERS = ("", "...", "\\ldots", "\\dots", "\\cdots", "\u2026")
_MAX_GROUP = 32
"""Boxes that may be one list."""
_BETWEEN_BOXES = re.compile(
    r"(?:\s|[$,;]|\\[()\[\],;! ]|\\q?quad|and|or|\\text\s*\{\s*(?:and|or)\s*\}|[a-zA-Z](?:_\{?[a-zA-Z0-9]+\}?)?\s*=)*"
)


@dataclass(frozen=True)
class Box:
    """The contents of a box, and its span in the text."""

    contents: str
    start: int
    end: int


def opens_thinking(prompt_end: str) -> bool:
    r"""Whether a prompt that ends like this leaves a thought open.

    >>> opens_thinking("<|Assistant|><think>\n"), opens_thinking("<think>\n\n</think>\n\n")
    (True, False)
    """
    return prompt_end.rstrip().endswith(tuple(begin for begin, _ in THINKING))


def after_thinking(completion: Completion) -> str | None:
    """The text after the last thought; None where a thought is not closed.

    A thought may lack its opening mark, which some models have in the prompt.

    >>> after_thinking(Completion("so 5 </think> It is 4.")), after_thinking(Completion("<think> It is 4."))
    (' It is 4.', None)
    """
    text, closed = completion.text, False
    for _, end in THINKING:
        _, mark, after = text.rpartition(end)
        closed = closed or bool(mark)
        text = after if mark else text
    if any(begin in text for begin, _ in THINKING) or (completion.in_thinking and not closed):
        return None
    return text


def boxes(text: str) -> list[Box] | None:
    r"""All boxes with contents, outermost ones only; None where the last one is not closed.

    Boxes that hold nothing, as in "put your answer in \boxed{}", are left out.

    >>> [box.contents for box in boxes(r"\boxed{1}, or \boxed{\frac{1}{2}} in \boxed{}, \boxed 7.")]
    ['1', '\\frac{1}{2}', '7']
    """
    found, position = [], 0
    while match := _BOX.search(text, position):
        start = match.end()
        while start < len(text) and text[start].isspace():
            start += 1
        if text[start : start + 1] == "{":
            if (end := _closing(text, start)) is None:
                return None
            box = Box(text[start + 1 : end], match.start(), end + 1)
        else:
            bare = re.compile(r"[^\s$.,;}\\]*").match(text, start)
            box = Box(bare[0] if bare else "", match.start(), bare.end() if bare else start)
        if box.contents.strip() not in _PLACEHOLDERS:
            found.append(box)
        position = max(box.end, match.end())
    return found


def _closing(text: str, start: int) -> int | None:
    """Position of the brace that closes the one at `start`; an escaped brace counts as text."""
    depth, position = 0, start
    while position < len(text):
        if text[position] == "\\":
            position += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
        position += 1
    return None


def last_boxes(text: str) -> list[str]:
    r"""Contents of the last box, and of those before it with nothing but a comma or "and" between, in their order.

    >>> last_boxes(r"First \boxed{9}. So $x = \boxed{3}$ or $x = \boxed{4}$.")
    ['3', '4']
    """
    found = boxes(text) or []
    group = found[-1:]
    for box in reversed(found[-_MAX_GROUP:-1]):
        if not _BETWEEN_BOXES.fullmatch(text[box.end : group[0].start]):
            break
        group.insert(0, box)
    return [box.contents for box in group]


def boxed(text: str) -> str | None:
    r"""Contents of the last ``\boxed{...}``, braces balanced; None without one, or where it is not closed.

    >>> boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    found = boxes(text)
    return found[-1].contents if found else None
