"""What the loss must reach, as lines of pass or FAIL with what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
OURS = "ours, overwriting"
FUSED = {name: f"ours, fused linear, {name} logits" for name in ("bf16", "fp32")}
LIGER_JSD = ("Liger jsd", "Liger jsd, 16-bit log-probs")
LIGER_FUSED = "Liger fused_linear_jsd"
SAME = 0.01


@dataclass(frozen=True)
class Bar:
    """One line. `verdict`: pass, FAIL, or `not measured` where a row for it is missing."""

    name: str
    needed: str
    measured: str
    verdict: str


def judge(rows: Sequence[Row], *, is_cuda: bool) -> list[Bar]:
    """The bars of this kind of device; GPU bars are set for H100 and H200."""
    return _gpu(rows) if is_cuda else _cpu(rows)


def _gpu(rows: Sequence[Row]) -> list[Bar]:
    logits = _at(rows, kind="logits", tokens=8192, tp=1)
    linear = _at(rows, kind="linear", tokens=8192, tp=1, hidden=2048, teacher_hidden=4096)
    clipped = [row for row in _at(logits, scheme=OURS) if row["clip"] is not None]
    kl = [row for row in logits if row["clip"] is not None and row["beta"] in (0.0, 1.0)]
    jsd = [row for row in logits if 0.0 < row["beta"] < 1.0]
    shares = [
        _bar(
            f"fused linear, {dtype} logits, {head} head: bare GEMMs / whole time",
            least,
            _values(_at(linear, scheme=FUSED[dtype], head=head), "gemm_share"),
        )
        for head, dtype, least in (
            ("trained", "bf16", 0.80),
            ("trained", "fp32", 0.70),
            ("frozen", "bf16", 0.75),
            ("frozen", "fp32", 0.65),
        )
    ]
    return [
        _bar("clipped, effective bytes an entry", 17.0, _values(clipped, "bytes_per_entry"), most=True),
        _bar("eager / ours, clipped KL", 8.0, _ratios(kl, "eager")),
        _bar("eager / ours, JSD", 15.0, _ratios(jsd, "eager")),
        _bar("torch.compile / ours", 1.5, _ratios(logits, "torch.compile")),
        _bar("Liger jsd / ours", 1.0, [r for name in LIGER_JSD for r in _ratios(_at(rows, kind="logits"), name)]),
        *shares,
        *(
            _bar(f"fused_linear_jsd / ours, {dtype} logits", 1.0, _ratios(_at(rows, kind="linear"), LIGER_FUSED, name))
            for dtype, name in FUSED.items()
        ),
        _declared(rows),
        _steady(rows),
        *_exactness(rows),
    ]


def _cpu(rows: Sequence[Row]) -> list[Bar]:
    at = _at(rows, kind="logits", tokens=512, width=32768, tp=1, dtype="float32")
    kl = [row for row in at if row["clip"] is not None and row["beta"] in (0.0, 1.0)]
    jsd = [row for row in at if 0.0 < row["beta"] < 1.0]
    return [
        _bar("eager / ours, clipped KL, time", 3.0, _ratios(kl, "eager")),
        _bar("eager / ours, JSD, time", 5.0, _ratios(jsd, "eager")),
        _bar("eager / ours, peak memory", 4.0, _ratios([*kl, *jsd], "eager", key="peak_bytes")),
        _steady(rows),
        *_exactness(rows),
    ]


def _exactness(rows: Sequence[Row]) -> list[Bar]:
    """Errors of ours in every cell over logits: fp32 arithmetic, and a gradient in the logits' dtype."""
    bars = []
    for dtype, largest in (("bfloat16", 2.0**-8), ("float32", 1e-5)):
        ours = [row for row in _at(rows, kind="logits", dtype=dtype) if row["scheme"] in ("ours", OURS)]
        if ours:
            name = f"ours, {dtype} logits, error of the"
            bars.append(_bar(f"{name} loss", 1e-5, _values(ours, "loss_error"), most=True))
            bars.append(_bar(f"{name} gradient", largest, _values(ours, "gradient_error"), most=True))
    return bars


def _declared(rows: Sequence[Row]) -> Bar:
    """The fused form's memory against what it declares; the passes in PyTorch work in more, so not on a CPU."""
    over = [row["extra_bytes"] / row["declared_bytes"] for row in _at(rows, kind="memory")]
    return _bar("fused linear, memory beside its results / declared buffers", 1.05, over, most=True)


def _steady(rows: Sequence[Row]) -> Bar:
    """The fused form's memory at one number of tokens against the other."""
    found, spread = _at(rows, kind="memory"), []
    for row in found:
        alike = [other for other in found if (other["scheme"], other["head"]) == (row["scheme"], row["head"])]
        if len(alike) > 1:
            spread.append(max(r["extra_bytes"] for r in alike) / min(r["extra_bytes"] for r in alike))
    return _bar("fused linear, that memory at two numbers of tokens, ratio", 1.0 + SAME, spread, most=True)


def _at(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows that were measured and have these values."""
    return [row for row in rows if row["status"] == "ok" and all(row[key] == value for key, value in wanted.items())]


def _values(rows: Iterable[Row], key: str) -> list[float]:
    """The rows' values, of those that have one."""
    return [row[key] for row in rows if key in row]


def _ratios(rows: Sequence[Row], theirs: str, ours: str = OURS, key: str = "both_s") -> list[float]:
    """Their value over ours in each cell that has both."""
    by_cell = {row["title"]: row[key] for row in _at(rows, scheme=ours)}
    return [row[key] / by_cell[row["title"]] for row in _at(rows, scheme=theirs) if row["title"] in by_cell]


def _bar(name: str, bound: float, values: Sequence[float], *, most: bool = False) -> Bar:
    """The worst of `values` against a bound: at least, or with `most` at most."""
    worst: Callable[[Sequence[float]], float] = max if most else min
    needed = f"{'<=' if most else '>='} {bound:g}"
    if not values:
        return Bar(name, needed, "-", "not measured")
    found = worst(values)
    holds = all(value <= bound if most else value >= bound for value in values)  # NaN holds nowhere
    return Bar(name, needed, f"{found:.3g} (worst of {len(values)})", "pass" if holds else "FAIL")
