"""A user's own grader, named by its place: `my_module:grade`, or `path/to/file.py:grade`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from renio_megatron.errors import ConfigError, DataError
from renio_megatron.evaluation.graders.grader import Completion, Grader
from renio_megatron.files import user_path
from renio_megatron.types import Record, Verdict


def custom_grader(place: str) -> Grader:
    """The grader at `place`: a function (Completion, Record) -> Verdict, or True, False or None in place of one.

    A module is searched for in the current directory, too.

    Raises:
        ConfigError: there is no such module or function, or it fails while it is imported.
    """
    function = _function_at(place)

    def grade(completion: Completion, record: Record) -> Verdict:
        found: Any = function(completion, record)
        if isinstance(found, Verdict):
            return found
        if found is None or isinstance(found, bool):
            return Verdict(found)
        raise DataError(
            f"it returned {found!r}, which is no Verdict. Return renio_megatron.evaluation.graders.Verdict, or True, "
            "False, or None where it cannot tell."
        )

    return Grader(place, grade)


def _function_at(place: str) -> Callable[[Completion, Record], Any]:
    module_name, _, name = place.rpartition(":")
    try:
        module = _module(module_name)
    except Exception as error:  # a user's file may raise anything
        raise ConfigError(
            f"data.grader={place}: {module_name!r} cannot be imported ({type(error).__name__}: {error}). Give a module "
            "that Python finds from here, or the path of a file: path/to/file.py:grade."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            f"data.grader={place}: {module_name!r} has no function {name!r}. Write one that takes (completion, record) "
            "and returns a Verdict."
        )
    return function


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)  # last: a file here must not hide a package
        return importlib.import_module(name)
    path = user_path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
