"""Views in a recipe: each setting that names one is replaced by the template and the system turn in its file."""

from __future__ import annotations

from pathlib import Path

from renio_megatron.config.flat import FlatSettings
from renio_megatron.config.parser import literal
from renio_megatron.config.views import read_view
from renio_megatron.errors import ConfigError

_ROUTES = "teacher.routes."


def expand_views(settings: FlatSettings) -> None:
    """Puts texts in the place of views. What is given later is used, null too: a template after a view switches the
    whole view off, a system turn after it the view's system turn.

    Raises:
        ConfigError: a view that is not there, or that one file gives together with what it stands for.
    """
    routes = {key.split(".")[2] for key in settings.values if key.startswith(_ROUTES)}
    for prefix in ("data.student_", "data.teacher_", "", *(f"{_ROUTES}{name}." for name in sorted(routes))):
        _expand(settings, prefix)


def _expand(settings: FlatSettings, prefix: str) -> None:
    key, template, system = f"{prefix}view", f"{prefix}template", f"{prefix}system"
    name, source = settings.values.pop(key, (None, ""))
    if name is None or _is_given_later(settings, template, key, source, "what a prompt is"):
        return
    path = Path(source)
    view = read_view(str(name), f"{source}: {key}", path.parent if path.is_file() else None)
    settings.values[template] = (literal(view.template), source)
    settings.written[template] = f"{key} ({view.where})"
    if view.system is None or _is_given_later(settings, system, key, source, f"what {view.where} has as system turn"):
        return
    settings.values[system] = (literal(view.system), source)
    settings.written[system] = f"the system turn of {key} ({view.where})"


def _is_given_later(settings: FlatSettings, other: str, key: str, source: str, what: str) -> bool:
    """Whether another setting is given after a view; raises `ConfigError` where it is given beside it."""
    if other not in settings.values:
        return False
    order, given = list(settings.sources), settings.values[other][1]
    if given == source:
        raise ConfigError(f"{source}: {key} and {other} both say {what}. Leave one of them out.")
    return order.index(given) > order.index(source)
