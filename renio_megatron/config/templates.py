"""Prompt templates as text: their fields, and whether they use a record's contents."""

from __future__ import annotations

import re
from collections.abc import Callable

from renio_megatron.errors import ConfigError

FIELDS = ("problem", "solution")
_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")


def fields_of(template: str) -> list[str]:
    """The names between single braces, in order. A double brace stands for a single one, and a brace that encloses no
    name, as in ``\\boxed{}``, for itself.

    >>> fields_of("{problem} {{solution}} { problem } \\\\boxed{}")
    ['problem']
    """
    return [match[1] for match in _FIELD.finditer(template) if match[1] is not None]


def filled(template: str, value_of: Callable[[str], str]) -> str:
    """The template with each field replaced by its text; braces inside these texts stay as they are."""
    return _FIELD.sub(lambda match: value_of(match[1]) if match[1] else match[0][0], template)


def check_fields(setting: str, template: str) -> None:
    """Raises `ConfigError` where a template has a field that records do not."""
    unknown = [name for name in fields_of(template) if name not in FIELDS]
    if unknown:
        raise ConfigError(
            f"{setting} may use the fields {{problem}} and {{solution}}; got {{{unknown[0]}}}. "
            f"Write {{{{{unknown[0]}}}}} for literal braces."
        )


def check_template(setting: str, template: str, needed: tuple[str, ...]) -> None:
    """Raises `ConfigError` where a template has an unknown field, or none of the `needed` ones: then every prompt
    would be the same text.
    """
    check_fields(setting, template)
    if not set(needed) & set(fields_of(template)):
        fields = " or ".join(f"{{{name}}}" for name in needed)
        raise ConfigError(
            f"{setting}={template!r} would give every record the same prompt: it has no {fields}. Write the field in "
            "single braces and without spaces where the record's text belongs."
        )
