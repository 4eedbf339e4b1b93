"""Python's syntax in texts that may not be Python: what parses, what a program defines, and what it lacks."""

from __future__ import annotations

import ast
import builtins
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

# A longer text is no program of a model, and deep trees can overflow the stack of Python's parser before 3.11.
MAX_CHARS = 1 << 16
_MAX_PARSED = 1 << 22  # characters, all tries together: the parser reads a text to its end, wherever its error is
_MAX_ROUNDS = 50
_PARSING = threading.Lock()  # filters of warnings are one for all threads
_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)
# Lines that may begin a program; without this, each line of prose would be parsed.
_START = re.compile(
    r"(?:def|async|class|import|from|if|for|while|with|try)\b|@|#|[rRuUbB]?(?:\"\"\"|''')"
    r"|[A-Za-z_][\w.]*\s*(?:\(|\[|=[^=]|[-+*/|&^%:]=|:\s*\w+[\w\[\], .]*=)"
    r"|[A-Za-z_]\w*(?:\s*,\s*[A-Za-z_]\w*)+\s*="
)
_BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}
_Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def tree_of(text: str) -> ast.Module | None:
    """The text's syntax tree; None where it is no Python, or longer than `MAX_CHARS`."""
    try:
        return _parse(text) if len(text) <= MAX_CHARS else None
    except _ERRORS:
        return None


def _parse(text: str) -> ast.Module:
    with _PARSING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in the candidate's texts
        tree = ast.parse(text)
        compile(tree, "<program>", "exec", dont_inherit=True)  # it sees more: a `return` outside of a function
    return tree


def longest_prefix(lines: Sequence[str], budget: list[int] | None = None) -> int:
    """How many of the first lines parse together, at the most; 0 where the budget of characters to parse is spent.

    >>> longest_prefix(["x = (1 +", "  2)", "And so on."])
    2
    """
    count, budget = len(lines), [_MAX_PARSED] if budget is None else budget
    while count:
        text = "\n".join(lines[:count])
        budget[0] -= len(text) + 1
        if budget[0] < 0:
            return 0
        try:
            _parse(text)
        except SyntaxError as error:
            # Tokens up to the error are the same in every prefix that holds its line, so all of those fail as well.
            count = min(count, error.lineno or 1) - 1
        except (ValueError, RecursionError, MemoryError, OverflowError):
            return 0
        else:
            return count
    return 0


def longest_part(text: str) -> str:
    """The run of lines that parses and has the most lines that are not blank; empty without one.

    >>> longest_part("Sure. Here it is:\\ndef f(x):\\n    return x\\nIt returns x.")
    'def f(x):\\n    return x'
    """
    lines = text[-MAX_CHARS:].split("\n")
    best, best_size, start, budget = "", 0, 0, [_MAX_PARSED]
    while start < len(lines) and budget[0] > 0:
        count = 0
        if _START.match(lines[start]):
            count = longest_prefix(lines[start:], budget)
            part = lines[start : start + count]
            size = sum(bool(line.strip()) for line in part)
            if size > best_size:
                best, best_size = "\n".join(part), size
        start += count or 1  # within a part that parses, another one would end at the same line
    return best


def defines(tree: ast.Module, name: str) -> bool:
    """Whether the program binds the name at its top level, or as a method of a class `Solution`."""
    if name in bound_names(tree):
        return True
    return any(
        isinstance(node, ast.ClassDef) and node.name == "Solution" and name in _bound(node.body) for node in tree.body
    )


def bound_names(tree: ast.Module) -> set[str]:
    """Names that the program binds at its top level, in branches and loops as well."""
    return _bound(tree.body)


def _bound(body: Sequence[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for statement in body:
        names |= names_of(statement)
    return names


def names_of(statement: ast.stmt) -> set[str]:
    """Names that a statement binds in its own scope."""
    names, waiting = set(), [statement]  # type: set[str], list[ast.AST]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _Definition):
            names.add(node.name)
            continue  # what is inside has a scope of its own
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if not isinstance(node, ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return names


def missing_names(tree: ast.AST) -> set[str]:
    """Names that the program, or a part of it, reads and binds nowhere, in any scope."""
    read: set[str] = set()
    bound = set(_BUILTINS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, _Definition):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            if any(alias.name == "*" for alias in node.names):
                return set()
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return read - bound


def without_tests(text: str, tree: ast.Module, entry_point: str) -> str:
    """The program without statements of its top level that only try the entry point out, or ask for input.

    Such are assertions, prints, calls of the entry point and of what calls it, `input`, the block of `__main__`, and
    variables that the entry point does not need. A wrong example of a model must not make a right function fail.
    Imports, definitions, and what they need stay.
    """
    definitions = [node for node in tree.body if isinstance(node, _Definition)]
    used = {name for node in definitions for name in missing_names(node)} | {entry_point}
    needed = _needed(tree, entry_point)
    testing = [  # what calls the entry point is a test as well
        ({node.name}, _mentions(node))
        for node in definitions
        if node.name not in ("Solution", entry_point) and not _defines_inside(node, entry_point)
    ]
    trying = {entry_point, "input", "unittest", "doctest"}
    _spread(trying, testing, lambda names, mentions: names if mentions & trying else set())
    lines, dropped = text.split("\n"), []
    for node in tree.body:
        if isinstance(node, (*_Definition, ast.Import, ast.ImportFrom)):
            continue
        names = names_of(node)
        # An attribute of the entry point may be set: what is assigned counts, not where.
        mentions = _mentions(node.value if isinstance(node, ast.Assign) else node)
        tries = isinstance(node, ast.Assert) or _is_main(node) or trying & mentions or _prints(node)
        if tries and not names & (used - trying) and entry_point not in names:
            dropped.append(node)
            trying |= names
        elif names and isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and not names & needed:
            dropped.append(node)
    gone = {id(node) for node in dropped}
    kept = {line for node in tree.body if id(node) not in gone for line in _lines_of(node)}
    cut = {line for node in dropped for line in _lines_of(node)} - kept
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in cut)


def _needed(tree: ast.Module, entry_point: str) -> set[str]:
    """Names of the top level that the entry point needs, directly or not; all of them where it may look names up."""
    if _mentions(tree) & {"globals", "locals", "vars", "eval", "exec"}:
        return bound_names(tree)
    needed = {entry_point, "Solution"}
    bound = [(names_of(node), missing_names(node) | _mentions(node)) for node in tree.body]
    # What binds nothing may change what is needed.
    complete = _spread(needed, bound, lambda names, reads: reads if not names or names & needed else set())
    return needed if complete else bound_names(tree)


def _spread(
    found: set[str], pairs: list[tuple[set[str], set[str]]], found_by: Callable[[set[str], set[str]], set[str]]
) -> bool:
    """Adds to `found` what the pairs lead to, until nothing is new; False where that takes too many rounds."""
    for _ in range(_MAX_ROUNDS):
        size = len(found)
        for one, other in pairs:
            found |= found_by(one, other)
        if len(found) == size:
            return True
    return False


def _lines_of(node: ast.stmt) -> Iterator[int]:
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return iter(range(first, (node.end_lineno or node.lineno) + 1))


def _mentions(node: ast.AST) -> set[str]:
    """Names and attributes that the node reads."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} | {
        n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
    }


def _defines_inside(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, _Definition) and n.name == name for n in ast.walk(node))


def _is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and any(
        isinstance(inner, ast.Name) and inner.id == "__name__" for inner in ast.walk(node.test)
    )


def _prints(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"


def does_something(tree: ast.Module) -> bool:
    """Whether the program does more than name values and words, as an example of input or output would.

    >>> does_something(ast.parse("YES")), does_something(ast.parse("print('YES')"))
    (False, True)
    """
    return any(
        not isinstance(node, ast.Expr) or any(isinstance(inner, ast.Call) for inner in ast.walk(node))
        for node in tree.body
    )
