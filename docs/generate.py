"""Writes the parts of the documentation that follow from the code: `python docs/generate.py`, or `--check`.

A generated part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "renio_megatron"
COLUMN = 32  # where purposes begin
WIDEST = 100  # characters of a purpose, if it can be cut


def purpose(path: Path) -> str:
    """The first sentence of a module's docstring; of a long one what stands before a colon."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    sentence = re.split(r"\.(?:\s|$)", text)[0]
    return sentence if len(sentence) <= WIDEST else re.split(r"[:;](?:\s|$)", sentence)[0]


def tree() -> str:
    """Every file of the package with its purpose, folders after files."""
    return "\n".join(["```", "renio_megatron/", *_lines(PACKAGE, 1), "```"])


def _lines(folder: Path, depth: int) -> list[str]:
    found = []
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            found.append(f"{'  ' * depth}{path.name}".ljust(COLUMN) + f" {purpose(path)}")
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        found.append(f"{'  ' * depth}{inner.name}/".ljust(COLUMN) + f" {purpose(inner / '__init__.py')}")
        found += _lines(inner, depth + 1)
    return found


def decisions() -> str:
    """A line for each decision."""
    files = sorted((ROOT / "docs" / "design" / "decisions").glob("[0-9]*.md"))
    titles = [re.sub(r"^# (\d+: )?", "", path.read_text().partition("\n")[0]) for path in files]
    return "\n".join(f"- [{path.stem[:3]}: {title}]({path.name})" for path, title in zip(files, titles, strict=True))


def _reference(name: str) -> str:
    """A part that follows from the package, not from its files alone."""
    sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
    return getattr(importlib.import_module("references"), name)()


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "tree": ("docs/design/architecture.md", tree),
    "decisions": ("docs/design/decisions/README.md", decisions),
    "recipe": ("docs/reference/recipe.md", partial(_reference, "recipe")),
    "metrics": ("docs/reference/metrics.md", partial(_reference, "metrics")),
    "notices": ("docs/guides/runs.md", partial(_reference, "notices")),
    "cli": ("docs/reference/cli.md", partial(_reference, "command_line")),
}
"""Name -> (the page, what stands there)."""


def generated(name: str) -> tuple[Path, str]:
    """The page of a part, and its whole text with the part as it should be.

    Raises:
        ValueError: the page has no such part.
    """
    file, make = PARTS[name]
    page = ROOT / file
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{file} has no '{begin} ... {end}'")
    return page, f"{before}{begin}\n{make()}\n{end}{after}"


def main(arguments: list[str]) -> int:
    """0; with `--check` 1 where a page is not what it would be."""
    code = 0
    for name in PARTS:
        page, text = generated(name)
        if page.read_text() == text:
            continue
        if "--check" in arguments:
            print(f"{page.relative_to(ROOT)}: '{name}' is out of date; run python docs/generate.py")
            code = 1
        else:
            page.write_text(text)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
