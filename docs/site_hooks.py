"""Of the site: links of pages that leave docs/, into the repository, which the site is not, are shown as paths."""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]*)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page as the site has it."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def shown(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if path.startswith("docs/"):
            return match[0]
        return match[1] if match[1].strip("`") in path else f"{match[1]} (`{path}`)"

    return _LINK.sub(shown, markdown)
