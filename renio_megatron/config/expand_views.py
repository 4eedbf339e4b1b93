"""Views in a recipe: each setting that names one is replaced by the template and the system turn in its file."""

from __future__ import annotations

from pathlib import Path

from renio_megatron.config.flat import FlatSettings
from renio_megatron.config.parser import literal
from renio_megatron.config.views import read_view
from renio_megatron.errors import ConfigError

_ROUTES = "teacher.routes."


def expand_views(settings: FlatSettings) -> None:
    """Puts texts in the place of views; of a view and a template the one that was given later is used.

    Raises:
        ConfigError: a view that is not there, or that is given together with a template.
    """
    routes = {key.split(".")[2] for key in settings.values if key.startswith(_ROUTES)}
    for prefix in ("data.student_", "data.teacher_", "", *(f"{_ROUTES}{name}." for name in sorted(routes))):
        _expand(settings, prefix)


def _expand(settings: FlatSettings, prefix: str) -> None:
    key, template, system = f"{prefix}view", f"{prefix}template", f"{prefix}system"
    name, source = settings.values.pop(key, (None, ""))
    if name is None:
        return
    order = list(settings.sources)
    other, given = settings.values.get(template, (None, ""))
    if other is not None and given == source:
        raise ConfigError(f"{source}: {key} and {template} both say what a prompt is. Leave one of them out.")
    if other is not None and order.index(given) > order.index(source):
        return
    path = Path(source)
    view = read_view(str(name), f"{source}: {key}", path.parent if path.is_file() else None)
    settings.values[template] = (literal(view.template), source)
    if view.system is not None and system not in settings.values:
        settings.values[system] = (literal(view.system), source)
