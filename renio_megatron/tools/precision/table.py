"""The table of `renio compare-precision`: one line per figure, one column per precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

_SPREAD = (
    ("absolute_rms", "RMS error, nats", "{:.2g}"),
    ("absolute_p99", "99th percentile, nats", "{:.2g}"),
    ("absolute_max", "largest, nats", "{:.2g}"),
    ("relative_rms", "RMS, relative", "{:.2%}"),
)
_BLOCKS: tuple[tuple[tuple[str, str, str], ...], ...] = (
    tuple((f"student_logp/{key}", f"student: {label}", form) for key, label, form in _SPREAD),
    tuple((f"teacher_logp/{key}", f"teacher: {label}", form) for key, label, form in _SPREAD),
    (
        ("divergence/token_relative", "divergence: mean error of tokens", "{:.2%}"),
        ("divergence/mean_relative", "divergence: mean", "{:+.2%}"),
    ),
    (
        ("pivotal/flipped", "verdict flips, of all tokens", "{:.2%}"),
        ("pivotal/lost", "pivotal no more, of the pivotal", "{:.2%}"),
        ("pivotal/gained", "newly pivotal, of the pivotal", "{:.2%}"),
        ("raw_weight/from_1", "raw weight leaves 1, sequences", "{:.2%}"),
        ("raw_weight/to_1", "raw weight becomes 1, sequences", "{:.2%}"),
    ),
    (
        ("weight/relative_rms", "weight: RMS error, relative", "{:.2%}"),
        ("weight/relative_max", "weight: largest, relative", "{:.2%}"),
        ("weight/rank_correlation", "weight: rank correlation", "{:.4f}"),
    ),
    (
        ("gradient/cosine", "gradient: cosine", "{:.4f}"),
        ("gradient/norm_relative", "gradient: norm", "{:+.2%}"),
        ("gradient/relative", "gradient: error, relative", "{:.2%}"),
        ("gradient/worst_cosine", "worst parameter: cosine", "{:.4f}"),
        ("gradient/worst_relative", "worst parameter: error, relative", "{:.2%}"),
    ),
)


def precision_table(found: Mapping[str, Any]) -> Table:
    """The table of a comparison.

    Args:
        found: the content of precision.json; a figure that is None shows as "-".
    """
    caption = (
        f"{found['sequences']} sequences, {found['tokens']} tokens, {found['pivotal_tokens']} of them pivotal, "
        f"{found['weights_not_1']} raw weights other than 1. FP8 against {found['baseline']}; "
        f"student: {found['student']}; teacher: {found['teacher']}. {found['versions']}; {found['device']}."
    )
    title = "Errors on the same rollouts (student, teacher: of their log p)"
    table = Table(title=title, title_justify="left", caption=escape(caption), caption_justify="left")
    table.add_column("", no_wrap=True)
    variants: Mapping[str, Mapping[str, Any]] = found["variants"]
    for name in variants:
        words, _, other = name.rpartition(" ")  # two lines: the last word below the others
        heading = escape(f"{words.replace(' against', ' /')}\n{other}")
        table.add_column(heading, justify="right", min_width=8, no_wrap=True)
    for block in _BLOCKS:
        for key, label, form in block:
            cells = ["-" if one[key] is None else form.format(one[key]) for one in variants.values()]
            table.add_row(label, *cells, end_section=key == block[-1][0])
    return table
