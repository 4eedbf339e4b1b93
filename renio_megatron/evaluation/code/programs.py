"""The program in a completion."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from renio_megatron.evaluation.code import syntax

_THOUGHTS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
_FENCE = re.compile(r"^([ \t]*)(?:>[ \t]?)?(`{3,}|~{3,})[ \t]*\{?\.?([\w+#-]*)[^`]*$")
_PYTHON = frozenset({"python", "py", "python3", "python2", "py3", "sage", "cython"})
_INDENT = "    "
_MAX_BLOCKS = 100


@dataclass(frozen=True)
class _Block:
    """A fenced block: its text, and whether its tag says Python, or nothing."""

    text: str
    python: bool
    untagged: bool


def find_program(completion: str, entry_point: str | None, prompt: str | None) -> str | None:
    r"""The program in a completion; None where there is none.

    It is looked for behind the thinking: the last fenced block that defines the entry point, with what it lacks from
    earlier blocks; else the last block that is a program; else the longest part of the text that is. Examples and
    tests at its top level are left out where there is an entry point. A block or text that does not parse is returned
    as it is, if it tries to define the entry point: the verdict then names the syntax error.

    >>> find_program("Here:\n```python\ndef f(x):\n    return x\n\nprint(f(1))\n```\nDone.", "f", None)
    'def f(x):\n    return x\n'
    >>> find_program("    return x\n", "f", "def f(x):\n")
    'def f(x):\n    return x\n'

    Args:
        completion: what the model wrote, special tokens left out.
        entry_point: the function (or method of `Solution`) that the tests call; None for whole programs.
        prompt: the beginning of a program that completions continue, as HumanEval's: it is put before what does not
            define the entry point itself. None where completions are whole.
    """
    text = _answer(completion)
    if text is None:
        return None
    program = _chosen(text, entry_point, prompt)
    if program is None or not program.strip():
        return None
    tree = syntax.tree_of(program) if entry_point is not None else None
    if tree is not None and entry_point is not None:
        program = syntax.without_tests(program, tree, entry_point)
    return program.rstrip() + "\n"


def _answer(completion: str) -> str | None:
    """What stands behind the thinking; None where the thinking does not end."""
    text = completion.replace("\r\n", "\n").replace("\r", "\n").replace("\N{NO-BREAK SPACE}", " ").lstrip("\ufeff")
    for begin, end in _THOUGHTS:
        if end in text:  # a template may have written the beginning
            text = text.rpartition(end)[2]
        if begin in text:
            return None
    return text


def _chosen(text: str, entry_point: str | None, prompt: str | None) -> str | None:
    blocks = _blocks(text)[-_MAX_BLOCKS:]
    texts = [block.text for block in blocks if block.python or block.untagged]
    if entry_point is None:
        return _last_program(blocks) or (None if blocks else syntax.longest_part(text))
    if (found := _last_defining(texts, entry_point)) is not None:
        return found
    named = re.compile(rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}\b", re.MULTILINE)
    for block in reversed(texts):
        if named.search(block):
            return _repaired(block, entry_point)
    if named.search(text):
        return _repaired(text, entry_point)
    if prompt is not None:
        bodies = [*reversed(texts), text] if not texts else [*reversed(texts)]
        return next((whole for body in bodies if (whole := _continued(prompt, body)) is not None), None)
    return _last_program(blocks) or (None if blocks else syntax.longest_part(text) or None)


def _blocks(text: str) -> list[_Block]:
    """The fenced blocks, without the indentation of their fences; the last may be open."""
    blocks: list[_Block] = []
    fence, indent, tag, lines = "", 0, "", []  # type: str, int, str, list[str]

    def close() -> None:
        body = "\n".join(_unindented(line, indent) for line in lines) + "\n"
        variants = (body, body.expandtabs(4), body.expandtabs(8)) if "\t" in body else (body,)
        whole = (variant for variant in variants if syntax.tree_of(variant) is not None)
        blocks.append(_Block(next(whole, body), tag in _PYTHON, not tag))

    for line in text.split("\n"):
        match = _FENCE.match(line)
        closes = match and fence and match[2][0] == fence[0] and len(match[2]) >= len(fence)
        if fence and closes and line.strip("> \t") == (match[2] if match else None):
            close()
            fence, lines = "", []
        elif match and closes and match[3].lower() in _PYTHON:  # a model forgot to close the block before
            close()
            fence, indent, tag, lines = match[2], len(match[1]), match[3].lower(), []
        elif fence and line.rstrip().endswith(fence):  # no line of Python ends like this
            lines.append(line.rstrip().removesuffix(fence))
            close()
            fence, lines = "", []
        elif fence:
            lines.append(line)
        elif match:
            fence, indent, tag, lines = match[2], len(match[1]), match[3].lower(), []
    if fence and any(line.strip() for line in lines):
        close()
    return blocks


def _unindented(line: str, indent: int) -> str:
    blank = len(line) - len(line.lstrip(" \t"))
    return line[min(indent, blank) :]


def _last_defining(texts: list[str], entry_point: str) -> str | None:
    """The last block that parses and defines the entry point, behind the earlier ones whose names it lacks."""
    for number in reversed(range(len(texts))):
        tree = syntax.tree_of(texts[number])
        if tree is not None and syntax.defines(tree, entry_point):
            return _joined(texts, number)
    return None


def _last_program(blocks: list[_Block]) -> str | None:
    """The last block that is a program: tagged as Python, else one without a tag that does more than name values."""
    for python in (True, False):
        texts = [block.text for block in blocks if (block.python if python else block.untagged)]
        for number in reversed(range(len(texts))):
            tree = syntax.tree_of(texts[number])
            if tree is not None and tree.body and (python or syntax.does_something(tree)):
                return _joined(texts, number)
        if python and texts:
            return syntax.longest_part(texts[-1]) or texts[-1]
    return None


def _joined(texts: list[str], number: int) -> str:
    """The block, and before it those earlier ones that bind at their top level what it does not."""
    program = texts[number]
    for earlier in reversed(texts[:number]):
        tree, before = syntax.tree_of(program), syntax.tree_of(earlier)
        lacks = syntax.missing_names(tree) if tree is not None else set()
        if lacks and before is not None and lacks & syntax.bound_names(before):
            program = f"{earlier.rstrip()}\n\n{program}"
    return program


def _repaired(text: str, entry_point: str) -> str:
    """The longest part of the text that parses, if it defines the entry point; else the text."""
    for attempt in (text, textwrap.dedent(text), text.expandtabs(4)):
        part = syntax.longest_part(attempt)
        tree = syntax.tree_of(part)
        if tree is not None and syntax.defines(tree, entry_point):
            return part + "\n"
    return text


def _continued(prompt: str, body: str) -> str | None:
    """The prompt and as much of the body as continues it; None where nothing does."""
    head = prompt if prompt.endswith("\n") else prompt + "\n"
    body = body.strip("\n")
    start = len(head.rstrip("\n").split("\n"))
    dedented = textwrap.dedent(body)
    # As it is; without its first line's indentation, which the prompt's end may have held; at the margin; in tabs.
    variants = (body, _INDENT + body.lstrip(" "), textwrap.indent(dedented, _INDENT), body.expandtabs(4))
    best, best_size = None, 0
    for variant in variants:
        lines = (head + variant).split("\n")
        count = syntax.longest_prefix(lines)
        size = sum(bool(line.strip()) for line in lines[start:count])
        if size > best_size:
            best, best_size = "\n".join(lines[:count]) + "\n", size
    return best
