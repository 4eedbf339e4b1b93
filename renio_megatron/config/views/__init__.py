"""Views: how a model sees a problem, as text files.

A view's file is the user's turn, with the fields {problem} and {solution}. A line `[system]` before a system turn and a
line `[user]` before the user's make two turns of it. One line break at the file's end is no part of it.

In a recipe a view stands for a template and a system turn: `data.student_view: math` for `data.student_template`, and
`data.student_system` where the file has one. So a run keeps the text, and not a name whose file may change.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from renio_megatron.errors import ConfigError
from renio_megatron.files import user_path

_FOLDER = Path(__file__).parent
_SUFFIX = ".txt"
_TURN = re.compile(r"^\[(system|user)\][ \t]*\n", re.MULTILINE)

SHIPPED: tuple[str, ...] = tuple(sorted(path.stem for path in _FOLDER.glob(f"*{_SUFFIX}")))
"""Names of the views that ship with the package."""


@dataclass(frozen=True)
class View:
    """A view's texts.

    Attributes:
        template: the user's turn, with fields.
        where: its name, or its file.
        system: the system turn; None where there is none.
    """

    template: str
    where: str
    system: str | None = None


def read_view(name: str, setting: str, folder: Path | None) -> View:
    """A view that ships, or one of a file.

    Args:
        name: a name in `SHIPPED`, or a path.
        setting: the setting that names it, for messages.
        folder: where a relative path begins; None: the working directory.

    Raises:
        ConfigError: no such view, or a file that cannot be read as one.
    """
    if name in SHIPPED:
        return parse_view((_FOLDER / f"{name}{_SUFFIX}").read_text(encoding="utf-8"), name)
    path = user_path(name)
    path = path if folder is None or path.is_absolute() else folder / path
    if not path.is_file():
        near = difflib.get_close_matches(name, SHIPPED, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{setting}: there is no view {name!r}, nor a file {str(path)!r}.{hint} Give one of "
            f"{', '.join(SHIPPED)}, or a text file with {{problem}} in it."
        )
    try:
        return parse_view(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: {path} cannot be read as UTF-8 text: {error}.") from error


def parse_view(text: str, where: str) -> View:
    r"""The view of a file's text.

    >>> parse_view("[system]\nBe brief.\n[user]\n{problem}?\n", "here")
    View(template='{problem}?', where='here', system='Be brief.')
    >>> parse_view("{problem}\n\nThink.\n", "here")
    View(template='{problem}\n\nThink.', where='here', system=None)

    Raises:
        ConfigError: turns in another order, or an empty one.
    """
    before, *rest = _TURN.split(text)
    if not rest:
        turns = {"user": text}
    else:
        turns = dict(zip(rest[::2], rest[1::2], strict=True))
        if before.strip() or rest[::2] not in (["system", "user"], ["user"]):
            raise ConfigError(
                f"{where}: a view is text, or a line [system] with a system turn below it and a line [user] with the "
                "user's; nothing before them, and each once."
            )
    texts = {name: one.removesuffix("\n") for name, one in turns.items()}
    for name, one in texts.items():
        if not one.strip():
            raise ConfigError(f"{where}: the {name}'s turn is empty. Write it, or leave out its line.")
    return View(texts["user"], where, texts.get("system"))
