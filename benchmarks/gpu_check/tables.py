"""Tables of docs/ from the files of the stages: `scripts/gpu_check.sh --tables FOLDER`.

A page has places of the form `<!-- gpu_check NAME -->` ... `<!-- end -->`; what stands between is rewritten where
the folder has that table's stage, and stays where it has not.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gpu_check.record import problems, read

Found = dict[str, Any]
PAGES = ("results/benchmarks.md", "design/fp8.md")
PART_OF = {"attention": "step"}
"""Tables that are made of another stage's measurements."""
_PLACE = re.compile(r"(<!-- gpu_check (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def write_tables(folder: Path, docs: Path) -> int:
    """Writes every table whose stage is in `folder` into its place; 0, or 2 where the folder has no stage's file."""
    found = {path.stem: content for path in sorted(folder.glob("*.json")) if (content := read(path)) is not None}
    if not found:
        print(f"error: {folder} holds no file of a stage (smoke.json, loss.json, ...). Name the folder that came back.")
        return 2
    for name in PAGES:
        page = docs / name
        text = page.read_text(encoding="utf-8")
        page.write_text(_PLACE.sub(lambda match: _filled(match, found), text), encoding="utf-8")
        places = [match[2] for match in _PLACE.finditer(text)]
        print(f"{page}: " + ", ".join(f"{one}{'' if _stage_of(one, found) else ' (left as it is)'}" for one in places))
    return 0


def _stage_of(name: str, found: dict[str, Found]) -> Found | None:
    """The measurements that a table is made of."""
    return found.get(name) or found.get(PART_OF.get(name, ""))


def _filled(match: re.Match[str], found: dict[str, Found]) -> str:
    name = match[2]
    stage = _stage_of(name, found)
    if stage is None or name not in TABLES:
        return match[0]
    return f"{match[1]}\n{TABLES[name](stage)}\n\n{_made_with(stage)}\n\n{match[3]}"


def _made_with(stage: Found) -> str:
    versions = stage["versions"]
    words = [f"{name} {versions[name]}" for name in NAMED if name in versions]
    machine = f"{stage['gpu'] or 'a CPU, at toy size'}{', driver ' + stage['driver'] if stage['driver'] else ''}"
    state = "" if stage["complete"] else " Cut off by its limit: what is not here was not measured."
    wrong = "".join(f" Outside its limit: {unit}: {said}." for unit, said in problems(stage).items())
    return (
        f"{machine}; {', '.join(words)}; {stage['date']}, commit {stage['commit']}, `{stage['command']}`.{state}{wrong}"
    )


NAMED = ("python", "torch", "triton", "megatron-core", "transformer-engine", "nvidia-cudnn-cu13", "liger-kernel")


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    heads = list(heads)
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *map(list, rows)))


def _values(stage: Found) -> dict[str, float | None]:
    return {one["name"]: one["value"] for one in stage["measurements"]}


def _details(stage: Found) -> dict[str, Any]:
    return {one["name"]: one["detail"] for one in stage["measurements"] if "detail" in one}


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent where it is of a usual size; a dash for None.

    >>> number(0.0123456), number(123456.0), number(5.4e-08), number(None)
    ('0.0123', '123000', '5.40e-08', '-')
    """
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}")
    return f"{rounded:.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def smoke(stage: Found) -> str:
    """Rates of the device and of the LM head's products."""
    values = _values(stage)
    units = {one["name"]: one["unit"] for one in stage["measurements"]}
    scale = {"FLOP/s": (1e12, "TFLOP/s"), "B/s": (1e12, "TB/s"), "s": (1e-3, "ms")}
    rows = []
    for name, value in values.items():
        if value is not None and units[name] in ("FLOP/s", "B/s"):
            factor, unit = scale[units[name]]
            rows.append([name, f"{number(value / factor)} {unit}"])
    errors = [[name, number(value, 2)] for name, value in values.items() if "error" in name]
    return (
        f"{table(['rate', ''], rows)}\n\n{table(['error beside fp64; of FP8 and attention, beside bf16', ''], errors)}"
    )


def kernels(stage: Found) -> str:
    """How many comparisons there were, and the errors of whole vocabularies."""
    values = _values(stage)
    groups = [name.removesuffix(", comparisons") for name in values if name.endswith(", comparisons")]
    first = [
        [name, number(values[f"{name}, comparisons"]), number(values.get(f"{name}, outside their limit"))]
        for name in groups
        if values[f"{name}, comparisons"] is not None
    ]
    losses = [name.removesuffix(", error of the loss") for name in values if name.endswith(", error of the loss")]
    second = [
        [name, *(number(values.get(f"{name}, error of the {what}"), 2) for what in ("loss", "gradient"))]
        for name in losses
    ]
    text = (
        f"{table(['cases of `tests/losses/triton_cases.py`', 'comparisons', 'outside their limit'], first)}\n\n"
        f"{table(['a whole vocabulary', 'error of the loss', 'of the gradient'], second)}"
    )
    detail = _details(stage).get("scores, time")
    if detail is None:
        return text
    times = [number(1e3 * (values.get(f"scores{more}, time") or 0)) for more in ("", " with entropies")]
    errors = [number(values.get(f"scores, error of {name}"), 2) for name in ("log p", "entropy")]
    head = f"scores of {detail['tokens']} tokens, V = {detail['vocab']}, hidden {detail['hidden']}, fp32 logits"
    rows = [["log p alone", times[0], errors[0], "-"], ["with entropies", times[1], errors[0], errors[1]]]
    return f"{text}\n\n{table([head, 'ms', 'error of log p', 'of the entropy'], rows)}"


def loss(stage: Found) -> str:
    """Milliseconds and memory of every scheme, a table a kind of cell, and what ours must reach."""
    from loss_bench.bars import judge

    rows = [detail["row"] for detail in _details(stage).values() if "row" in detail]
    parts = []
    for kind in ("logits", "linear"):
        mine = [row for row in rows if row["kind"] == kind and row["tp"] == 1]
        cells = list(dict.fromkeys(_cell(row) for row in mine))
        heads = ["scheme", *(f"{cell}, {what}" for cell in cells for what in ("ms", "MiB"))]
        lines = []
        for scheme in dict.fromkeys(row["scheme"] for row in mine):
            found = {_cell(row): row for row in mine if row["scheme"] == scheme and row["status"] == "ok"}
            if found:
                fields = [_of_cell(found.get(cell), key, by) for cell in cells for key, by in (("both_s", 1e3), MIB)]
                lines.append([scheme, *fields])
        if lines:
            parts.append(f"{SHAPE[kind]}\n\n{table(heads, lines)}")
    bars = [[bar.name, bar.needed, bar.measured, bar.verdict] for bar in judge(rows, is_cuda=stage["gpu"] is not None)]
    parts.append(table(["what ours must reach", "needed", "measured", ""], bars))
    return "\n\n".join(parts)


MIB = ("peak_bytes", 2.0**-20)
SHAPE = {
    "logits": "Of given logits in bf16, N = 8192, V = 151,936; forward and backward, peak memory beyond the inputs:",
    "linear": "From hidden states (2048 and 4096 columns) and LM heads in bf16, N = 8192, V = 151,936:",
}


def _cell(row: Found) -> str:
    name = {0.0: "KL", 1.0: "reverse KL"}.get(row["beta"], "JSD")
    return (
        f"{name}{', clipped' if row['clip'] is not None else ''}{', ' + row['head'] + ' head' if row['head'] else ''}"
    )


def _of_cell(row: Found | None, key: str, factor: float) -> str:
    return "-" if row is None else number(row[key] * factor)


def step(stage: Found) -> str:
    """Phases of a step: medians of the steps after the first."""
    values, details = _values(stage), _details(stage)
    work = details["rollout, model operations"]["work"]
    numbers = sorted({int(name.split(",")[0].split()[1]) for name in values if re.match(r"step \d+, \w+, time", name)})
    drawn = work["sequences"] * work["completion"]
    read_ = work["sequences"] * (work["prompt"] + work["completion"] - 1)
    rows = []
    for phase, tokens in (("rollout", drawn), ("teacher", read_), ("train", read_)):
        times = [values[f"step {n}, {phase}, time"] for n in numbers[1:] or numbers]
        took = statistics.median(time for time in times if time is not None)
        memory = values[f"step {numbers[-1]}, {phase}, memory"]
        rate = (values[f"{phase}, model operations"] or 0) / took
        rows.append(
            [
                phase, number(took), number(tokens / took), number(rate / 1e12),
                f"{rate / (values['bf16 product'] or 1):.1%}", _gib(memory), _gib(values[f"{phase}, planned memory"]),
                "-" if (idle := values.get(f"{phase}, GPU idle")) is None else f"{idle:.0%}",
                number(values.get(f"{phase}, kernels"), 5),
            ]
        )  # fmt: skip
    heads = [
        "phase",
        "s",
        "tokens/s",
        "model TFLOP/s",
        "of a bf16 product's",
        "GiB",
        "planned GiB",
        "GPU idle",
        "kernels",
    ]
    student, teacher = details["rollout, model operations"]["models"]
    text = (
        f"Student {student}, teacher {teacher}; {work['sequences']} sequences, prompts of {work['prompt']} tokens, "
        f"completions of {work['completion']}:\n\n{table(heads, rows)}"
    )
    passes = [name for name in values if name.startswith("decoding pass") and not name.endswith("rate")]
    lines = [
        [name, number((values[name] or 0) * 1e3), number((values[f"{name}, its bytes at the copy's rate"] or 0) * 1e3)]
        for name in passes
    ]
    return f"{text}\n\n{table(['', 'ms', 'ms that its bytes alone take'], lines)}" if lines else text


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**30:.1f}"


def attention(stage: Found) -> str:
    """Candidates for a packed row, and one query."""
    values = _values(stage)
    names = list(
        dict.fromkeys(name.removeprefix("attention, ").rpartition(", ")[0] for name in values if ", forward" in name)
    )
    rows = []
    for name in names:
        fields = [values.get(f"attention, {name}, {key}") for key in ("forward", "both", "bytes", "error")]
        rows.append(
            [
                name, *(number(None if x is None else x * 1e3) for x in fields[:2]),
                number(None if fields[2] is None else fields[2] / 2**20), number(fields[3], 2),
            ]
        )  # fmt: skip
        other = values.get(f"attention, {name}, by torch")
        if other is not None:
            rows.append([f"{name}, by torch", number(other * 1e3), "-", "-", "-"])
    said = _details(stage)["attention, Transformer Engine's choice"]["said"]
    said = [line for line in said if "Running with config" not in line]
    heads = ["", "forward, ms", "both, ms", "MiB", "error"]
    return table(heads, rows) + "\n\nTransformer Engine said:\n\n```text\n" + "\n".join(said) + "\n```"


def cli(stage: Found) -> str:
    """How far a first step is from the CPU's, and what `renio train` reached."""
    values = _values(stage)
    labels = list(dict.fromkeys(name.rpartition(", loss, ")[0] for name in values if ", loss, relative" in name))
    keys = [f"{name}, relative difference" for name in ("loss", "grad_norm", "weights")]
    keys += [f"{name}, RMS difference" for name in ("student_logp", "teacher_logp")]
    rows = [[label, *(number(values.get(f"{label}, {key}"), 2) for key in keys)] for label in labels]
    heads = [
        "beside the CPU's fp32",
        "loss",
        "gradient norm",
        "weights",
        "log p of the student, nats",
        "of the teacher",
    ]
    units = {one["name"]: "" if one["unit"] == "1" else f" {one['unit']}" for one in stage["measurements"]}
    runs = [[name, number(value) + units[name]] for name, value in values.items() if name.startswith("renio train")]
    return f"{table(heads, rows)}\n\n{table(['', ''], runs)}"


def fp8(stage: Found) -> str:
    """Every precision beside bf16: a column each."""
    values = _values(stage)
    ends = ", student_logp/absolute_rms"
    names = [name.removesuffix(ends) for name in values if name.endswith(ends) and not name.startswith("modular")]
    rows = [
        [title, number(values.get(f"bf16, {key}")), *(number(values.get(f"{name}, {key}")) for name in names)]
        for title, key in OF_A_PRECISION.items()
    ]
    text = table(["", "bf16", *names], rows)
    columns = [name.removesuffix(ends) for name in values if name.endswith(ends) and name.startswith("modular")]
    lines = [[title, *(number(values.get(f"{c}, {key}")) for c in columns)] for title, key in OF_A_CHAIN.items()]
    short = [column.removeprefix("modular chain, ") for column in columns]
    return f"{text}\n\nThe modular chain's trained models, {_chain_words(stage)}:\n\n{table(['', *short], lines)}"


def _chain_words(stage: Found) -> str:
    facts = next(detail for name, detail in _details(stage).items() if name.startswith("modular chain"))
    return f"{facts['sequences']} sequences, {facts['tokens']} tokens, {facts['pivotal_tokens']} of them pivotal"


OF_A_PRECISION = {
    "teacher scores, s": "teacher, time",
    "student scores, s": "student scores, time",
    "forward, backward, optimizer, s": "train, time",
    "loss, nats a token": "loss",
    "loss, relative": "loss, relative",
    "gradient norm, relative": "grad_norm, relative",
    "student log p, RMS, nats": "student_logp/absolute_rms",
    "student log p, largest, nats": "student_logp/absolute_max",
    "teacher log p, RMS, nats": "teacher_logp/absolute_rms",
    "teacher log p, largest, nats": "teacher_logp/absolute_max",
    "divergence of a token": "divergence/token_relative",
    "verdict flips, of all tokens": "pivotal/flipped",
    "lost, of the pivotal": "pivotal/lost",
    "gained, of the pivotal": "pivotal/gained",
    "weight, RMS, relative": "weight/relative_rms",
    "weight, largest, relative": "weight/relative_max",
}
OF_A_CHAIN = {
    **{title: key for title, key in OF_A_PRECISION.items() if "/" in key},
    "mean divergence": "divergence/mean_relative",
    "weights, rank correlation": "weight/rank_correlation",
    "gradient, cosine": "gradient/cosine",
    "gradient, norm": "gradient/norm_relative",
    "gradient, error": "gradient/relative",
    "worst parameter, cosine": "gradient/worst_cosine",
    "worst parameter, error": "gradient/worst_relative",
}
TABLES: dict[str, Callable[[Found], str]] = {
    "smoke": smoke,
    "kernels": kernels,
    "loss": loss,
    "step": step,
    "attention": attention,
    "cli": cli,
    "fp8": fp8,
}
