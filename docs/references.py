"""Pages of the reference that follow from the code: keys of recipes, metrics, the command line."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from typing import Any

from renio_megatron.cli.main import _parser
from renio_megatron.config.places import is_tagged, keys_of, place_of_field
from renio_megatron.config.schema import SECTIONS, DistillationConfig, SftConfig
from renio_megatron.training.metrics.registry import METRICS


def recipe() -> str:
    """A table for each section: key, default, what it is."""
    both = [
        name for name in keys_of(DistillationConfig, "") if place_of_field(DistillationConfig, name).kind == "value"
    ]
    own = [name for name in keys_of(SftConfig, "") if name not in keys_of(DistillationConfig, "")]
    lines = ["## Outside of sections", "", *_table(DistillationConfig, both, ""), ""]
    lines += ["Of `renio sft` alone:", "", *_table(SftConfig, own, "")]
    for name in SECTIONS:
        if name not in keys_of(DistillationConfig, ""):
            continue
        place = place_of_field(DistillationConfig, name)
        if place.kind == "value":
            continue
        what = " (a list of such sections)" if place.kind == "list" else ""
        lines += ["", f"## `{name}`{what}", ""]
        if is_tagged(place.hint):
            for tag in place.hint.VARIANTS:
                inside = _section(f"{name}.", place.hint.variant(tag), place.field, without=place.hint.TAG)
                lines += [f"### `{place.hint.TAG}: {tag}`", "", *inside, ""]
        else:
            lines += _section(f"{name}.", place.hint, place.field)
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _section(prefix: str, schema: Any, field: str, *, without: str = "") -> list[str]:
    sentence = (inspect.getdoc(schema) or "").split("\n\n")[0].replace("\n", " ")
    names = [n for n in keys_of(schema, field) if place_of_field(schema, n).kind == "value" and n != without]
    lines = [sentence, *(["", *_table(schema, names, prefix)] if names else [])]
    for name in keys_of(schema, field):
        place = place_of_field(schema, name)
        if prefix and place.kind != "value":
            plural = {"table": f"{prefix}{name}.NAME", "list": f"{prefix}{name}.N"}.get(place.kind, f"{prefix}{name}")
            if is_tagged(place.hint):
                lines += ["", f"`{plural}`: a section as `{place.hint.SECTION}`."]
            else:
                lines += ["", *_section(f"{plural}.", place.hint, place.field)]
    return lines


def _table(schema: Any, names: list[str], prefix: str) -> list[str]:
    told = _attributes(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    lines = ["| key | default | |", "|---|---|---|"]
    for name in names:
        lines.append(f"| `{prefix}{name}` | {_default(fields[name])} | {told.get(name, '')} |")
    return lines


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value] if value is None or isinstance(value, bool) else value}`"


def _attributes(schema: Any) -> dict[str, str]:
    """Field -> what the docstrings of the class and its bases say of it."""
    found: dict[str, str] = {}
    for one in reversed(inspect.getmro(schema)):
        text = inspect.cleandoc(one.__doc__ or "") if "__doc__" in vars(one) and one.__doc__ else ""
        block = text.partition("Attributes:\n")[2]
        entries = re.split(r"\n(?=    \S)", "\n" + block.split("\n\n")[0]) if block else []
        for entry in entries:
            match = re.match(r"((?:[^:()]|\([^)]*\))+): (.*)", " ".join(entry.split()))
            for name, note in re.findall(r"([a-z0-9_]+)(?: \(([^)]*)\))?", match[1]) if match else ():
                found[name] = "; ".join(filter(None, (note, match[2]))).replace("|", "\\|")
    return found


def metrics() -> str:
    """Name, unit, how ranks are joined, what it is."""
    lines = ["| metric | unit | over ranks | |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| `{n}` | {m.unit} | {m.reduction} | {m.description} |" for n, m in METRICS.items()])


def notices() -> str:
    """What a run says once, and from when on."""
    from renio_megatron.training.notices.observer import NOTICES

    rows = [f"| {notice.what} | {notice.when} |" for notice in NOTICES]
    return "\n".join(["| seen | from when on |", "|---|---|", *rows])


def command_line() -> str:
    """Each command's usage, description and options."""
    (commands,) = (one for one in _parser()._actions if isinstance(one, argparse._SubParsersAction))
    lines = []
    for name, parser in commands.choices.items():
        lines += [f"## `renio {name}`", "", (parser.description or "").strip(), "", "```", _usage(parser), "```", ""]
        for action in parser._actions:
            if action.dest != "help" and action.option_strings:
                value = f" {action.metavar}" if action.metavar else ""
                told = (action.help or "") % {"default": action.default} if "%" in (action.help or "") else action.help
                lines.append(f"- `{action.option_strings[-1]}{value}`: {told}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _usage(parser: argparse.ArgumentParser) -> str:
    return " ".join(parser.format_usage().removeprefix("usage: ").split())
