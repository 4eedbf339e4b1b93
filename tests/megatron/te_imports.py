"""Whether an import finds Transformer Engine in this process, whatever is installed."""

from __future__ import annotations

import sys

NAME = "transformer_engine"


class _Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == NAME:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def forget(monkeypatch):
    """As if it had not been imported yet."""
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        monkeypatch.delitem(sys.modules, name)


def hide(monkeypatch):
    """As if it were not installed."""
    forget(monkeypatch)
    monkeypatch.setattr(sys, "meta_path", [_Hidden(), *sys.meta_path])


def put(monkeypatch, folder, source, pytorch=None):
    """Installs a package of this source, and of that one for its modules for torch, in place of what is there."""
    package = folder / NAME
    package.mkdir()
    (package / "__init__.py").write_text(source)
    if pytorch is not None:
        (package / "pytorch.py").write_text(pytorch)
    forget(monkeypatch)
    monkeypatch.syspath_prepend(folder)
