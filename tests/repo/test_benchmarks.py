"""The benchmark of the loss computes what it says: every scheme against fp64, counts, memory, bars, files. No times."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from renio_megatron.objective.reference import reference_objective
from tests.helpers import warm
from tests.helpers.jobs import python_path
from tests.helpers.multiprocess import run_ranks
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the source tree")
pytest.importorskip("loss_bench", reason="needs the source tree")

import loss  # noqa: E402
from loss_bench import bars, grid, measure, schemes  # noqa: E402
from loss_bench.collectives import rank_results  # noqa: E402
from loss_bench.exact import Exact  # noqa: E402
from loss_bench.grid import Bench  # noqa: E402
from loss_bench.problem import Cell, exact_tokens, make_problem  # noqa: E402
from loss_bench.schemes import SCHEMES, Scheme  # noqa: E402

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
DIVERGENCES = [(beta, clip) for beta in (0.0, 0.3, 1.0) for clip in (None, 0.05)]
INTERPRETED = tuple(scheme for scheme in SCHEMES if scheme is not schemes.COMPILED)
HEADS = {"logits": [{}], "linear": [{"hidden": 24, "teacher_hidden": 40, "trained": t} for t in (True, False)]}


def cells(scheme: Scheme, divergences=DIVERGENCES, **shape) -> list[Cell]:
    """Tiny cells of what the scheme says that it can do."""
    made = []
    for beta, clip in divergences:
        for heads in HEADS[scheme.kind]:
            cell = Cell(48, 96, beta=beta, clip=clip, **heads, **shape)
            refused = dataclasses.replace(scheme, missing=lambda device: None).refusal(cell, CPU)
            made += [] if refused else [cell]
    return made


def need(scheme: Scheme, device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if reason := scheme.missing(device):
        pytest.skip(f"{scheme.name}: {reason}")


def reference(problem, *, weighted: bool):
    """Loss and gradients by the reference, whole, in fp64; nothing of the benchmark's chunks."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in problem.leaves()]
    if problem.cell.kind == "logits":
        student, teacher = leaves[0], problem.teacher_logits.double()
    else:
        head = leaves[1] if problem.cell.trained else problem.student_head.double()
        student, teacher = leaves[0] @ head.T, problem.teacher_hidden.double() @ problem.teacher_head.double().T
    cell = problem.cell
    out = reference_objective(
        student, teacher, problem.token_ids, problem.owner, problem.num_sequences, beta=cell.beta,
        entry_clip=cell.clip, uniform=not weighted,
    )  # fmt: skip
    return out, torch.autograd.grad(out["loss"], leaves)


def results(scheme: Scheme, problem):
    """Loss and gradients of a scheme, on a copy where it destroys its input."""
    return measure.run_once(scheme, measure.working_copy(scheme, problem))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("scheme", INTERPRETED, ids=lambda scheme: scheme.name)
def test_every_scheme_has_the_reference_s_loss_and_gradient(scheme, device):
    need(scheme, device)
    for cell in cells(scheme, dtype=torch.bfloat16 if scheme.is_narrow else torch.float32):
        problem = make_problem(cell, device)
        expected, gradients = reference(problem, weighted=scheme.weights != "none")
        value, found = results(scheme, problem)
        tolerance = 0.1 if scheme.is_narrow else 1e-5
        assert float(value) == pytest.approx(float(expected["loss"].detach()), rel=tolerance), cell
        bounds = next(exact_tokens(problem, with_gradient=True)).at_a_bound if cell.kind == "logits" else None
        for mine, theirs in zip(found, gradients, strict=True):
            if scheme.is_narrow:
                # Rounding moves entries over a bound; what can be seen is a wrong sign or a wrong factor.
                alike = torch.cosine_similarity(mine.double().flatten(), theirs.flatten(), dim=0)
                assert alike > (0.9 if cell.clip is None else 0.5), cell
                assert 0.6 < float(mine.double().norm() / theirs.norm()) < 1.6, cell
                continue
            difference = (mine.double() - theirs).abs()
            if bounds is not None:
                difference = difference.masked_fill(bounds, 0.0)
            assert difference.max() <= 1e-4 * theirs.abs().max(), cell


WIDE = [scheme for scheme in INTERPRETED if scheme.kind == "logits" and not scheme.is_narrow]


@pytest.mark.parametrize("scheme", WIDE, ids=lambda scheme: scheme.name)
def test_16_bit_logits_lose_no_more_than_their_gradient_s_rounding(scheme):
    need(scheme, CPU)
    for cell in cells(scheme, dtype=torch.bfloat16):
        problem = make_problem(cell, CPU)
        value, gradients = results(scheme, problem)
        errors = Exact(problem).errors(float(value), gradients, weighted=scheme.weights != "none")
        assert errors.loss < 1e-5, cell
        assert errors.gradient < 2**-8, cell
        assert gradients[0].dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "clip"), [(0.0, 0.05), (0.3, None)])
def test_the_compiled_expression_has_the_reference_s_loss_and_gradient(beta, clip):
    need(schemes.COMPILED, CPU)
    ready = dataclasses.replace(schemes.COMPILED, forward=schemes.COMPILED.prepare(schemes.COMPILED.forward))
    problem = make_problem(Cell(48, 96, beta=beta, clip=clip, dtype=torch.float32), CPU)
    value, gradients = results(ready, problem)
    errors = Exact(problem).errors(float(value), gradients, weighted=True)
    assert errors.loss < 1e-6 and errors.gradient < 1e-5


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("weighted", [True, False])
def test_the_exact_answer_in_chunks_is_the_reference_s(kind, weighted, monkeypatch):
    monkeypatch.setattr("loss_bench.problem.EXACT_ENTRIES", 7 * 96)
    for cell in cells(Scheme("any", lambda problem: None, kind), dtype=torch.float32):
        problem = make_problem(cell, CPU)
        expected, gradients = reference(problem, weighted=weighted)
        assert torch.allclose(problem.weights.double(), reference(problem, weighted=True)[0]["weights"], rtol=1e-6)
        exact = Exact(problem)
        errors = exact.errors(float(expected["loss"].detach()), gradients, weighted=weighted)
        assert errors.loss < 1e-6, "the weights are in fp32"
        assert errors.gradient < 1e-6
        assert (
            exact.errors(float(expected["loss"].detach()), [2 * g for g in gradients], weighted=weighted).gradient > 0.9
        )
        broken = [g.clone().fill_(torch.nan) for g in gradients]
        assert not exact.errors(0.0, broken, weighted=weighted).gradient < 1.0


def test_what_a_scheme_cannot_do_is_said_in_a_word():
    by_name = {scheme.name: scheme for scheme in SCHEMES}
    clipped, jsd = Cell(8, 16, clip=0.05, dtype=torch.float32), Cell(8, 16, beta=0.5, dtype=torch.float32)
    assert by_name["Megatron KD"].refusal(clipped, CPU) == "no clip"
    assert by_name["NeMo-RL"].refusal(jsd, CPU) == "no JSD"
    assert by_name["DeepSpeed"].refusal(dataclasses.replace(jsd, beta=1.0), CPU) == "no reverse KL"
    assert by_name["eager"].refusal(dataclasses.replace(clipped, tp=8), CPU) == "no shards"
    assert by_name["Liger jsd"].refusal(jsd, CPU) in ("not installed", "no GPU")
    assert by_name["ours"].refusal(jsd, CPU) is None


def shard_answers(cell: Cell) -> dict:
    """On each rank: every scheme's results, and the columns of the whole problem's exact gradient."""
    problem = make_problem(cell, CPU)
    out, (gradient,) = reference(problem, weighted=True)
    columns = gradient.chunk(dist.get_world_size(), 1)[dist.get_rank()]
    found = rank_results(cell, dist.group.WORLD)
    for values in found.values():
        values["gradient_error"] = float((values.pop("gradient") - columns).abs().max() / gradient.abs().max())
        values["loss_error"] = abs(values["loss"] - float(out["loss"].detach())) / float(out["loss"].detach())
    return found


CALLS = {  # (forward, backward) of 2048 tokens; KL without bounds, otherwise
    "Megatron KD": ((5, 1), None),
    "NeMo-RL": ((10, 10), None),
    "DeepSpeed": ((3, 0), None),
    "ours": ((1, 0), (2, 0)),
    "ours, overwriting": ((1, 0), (2, 0)),
}


def _shards_of_every_divergence() -> list[dict]:
    return [shard_answers(Cell(2048, 64, tp=2, beta=b, clip=c, dtype=torch.float32)) for b, c in DIVERGENCES]


def test_schemes_over_two_ranks_are_exact_and_their_collectives_are_counted():
    seen = set()
    for rank in run_ranks(_shards_of_every_divergence, 2):
        for (beta, clip), found in zip(DIVERGENCES, rank, strict=True):
            is_plain = clip is None and beta in (0.0, 1.0)
            for name, values in found.items():
                seen.add(name)
                assert values["loss_error"] < 1e-5, (name, beta, clip)
                # At a bound fp32 may decide otherwise; a gradient without the other rank's part is far from this.
                assert values["gradient_error"] < (1e-5 if clip is None else 1e-2), (name, beta, clip)
                assert (values["forward_calls"], values["backward_calls"]) == CALLS[name][0 if is_plain else 1]
                assert (values["forward_bytes"] > 0) and (values["backward_bytes"] > 0) == (CALLS[name][0][1] > 0)
    assert seen == set(CALLS)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_peak_memory_of_a_known_case(device):
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    entries = 1 << 20

    def two_at_a_time():
        first = torch.ones(entries, device=device)
        second = first * 2
        del first
        third = second + 1
        del second, third

    assert measure.peak_bytes(two_at_a_time, device) == pytest.approx(8 * entries, rel=1e-3)
    whole = Scheme("log-softmax", lambda problem: problem.student_logits.log_softmax(-1).sum())
    memory = measure.memory_of(whole, make_problem(Cell(1024, 512, dtype=torch.float32), device))
    # Autograd keeps the log-probabilities; backward expands the sum's gradient without memory and writes one more.
    assert memory.results == 4 * 1024 * 512
    assert memory.peak == pytest.approx(3 * 4 * 1024 * 512, rel=0.35)


def row(scheme, both=1.0, **values) -> dict:
    cell = Cell(8192, 151936, beta=values.pop("beta", 0.0), clip=values.pop("clip", None))
    made = grid._row(cell, Scheme(scheme, lambda problem: None), "ok")
    return made | {"both_s": both, "peak_bytes": 1, "bytes_per_entry": 16.0, "gemm_share": 0.8} | values


def test_bars_take_the_worst_row_and_say_what_is_missing():
    rows = [
        row("ours, overwriting", clip=0.05),
        row("eager", 9.0, clip=0.05),
        row("ours, overwriting", beta=0.5),
        row("eager", 14.0, beta=0.5),
        row("torch.compile", 2.0, beta=0.5),
        row("torch.compile", 1.4, clip=0.05),
    ]
    found = {bar.name: bar for bar in bars.judge(rows, is_cuda=True)}
    assert found["clipped, effective bytes an entry"].verdict == "pass"
    assert found["eager / ours, clipped KL"].verdict == "pass"
    assert found["eager / ours, JSD"].verdict == "FAIL"
    assert found["torch.compile / ours"].measured == "1.4 (worst of 2)"
    assert found["torch.compile / ours"].verdict == "FAIL"
    assert found["Liger jsd / ours"].verdict == "not measured"
    names = [f"ours, bfloat16 logits, error of the {what}" for what in ("loss", "gradient")]
    assert [found[name].verdict for name in names] == ["not measured", "not measured"]
    wrong = row("ours, overwriting", clip=0.05, loss_error=1e-6, gradient_error=0.77)
    found = {bar.name: bar for bar in bars.judge([*rows, wrong], is_cuda=True)}
    assert [found[name].verdict for name in names] == ["pass", "FAIL"], "a fast loss with a wrong gradient"
    nan = bars.judge([row("ours, overwriting", clip=0.05, bytes_per_entry=float("nan"))], is_cuda=True)
    assert nan[0].verdict == "FAIL"


SMALL_COPY = {"cpu": 1 << 16, "cuda": 1 << 16}


def test_a_scheme_that_does_not_fit_or_breaks_leaves_the_other_rows(monkeypatch):
    def too_large(problem):
        raise torch.cuda.OutOfMemoryError("no memory")

    def broken(problem):
        raise ValueError("a fault")

    monkeypatch.setattr(measure, "COPY_BYTES", SMALL_COPY)
    monkeypatch.setattr(grid, "SCHEMES", (Scheme("large", too_large), Scheme("broken", broken), schemes.EAGER))
    found = Bench(CPU, repeats=1, warm_up=0).cell(Cell(8, 16, dtype=torch.float32))
    assert [row["status"] for row in found] == ["OOM", "error", "ok"]
    assert found[1]["message"] == "ValueError: a fault"


SMALL = ["--shapes", "24x64", "--tp", "1,2", "--hidden", "8:16", "--repeats", "2", "--warm-up", "1", "--device", "cpu"]


def check_files(folder: Path) -> None:
    written = json.loads((folder / "loss.json").read_text())
    assert {"machine", "rates", "rows", "collectives", "bars", "cells_left_out"} == set(written)
    assert {"torch", "triton", "liger_kernel", "command", "date", "cpu"} <= set(written["machine"])
    done = [row for row in written["rows"] if row["status"] == "ok"]
    assert {row["kind"] for row in done} == {"logits", "linear"} and {row["tp"] for row in done} == {1, 2}
    assert all(row["gradient_error"] < 1e-4 and row["both_s"] > 0 for row in done)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_a_table_a_json_file_and_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "COPY_BYTES", SMALL_COPY)
    monkeypatch.setattr(grid, "SCHEMES", INTERPRETED)
    threads = torch.get_num_threads()
    try:
        once = ["--repeats", "1", "--warm-up", "0"]
        arguments = [*SMALL, *once, "--no-collectives", "--divergences", "1:none", "--out", str(tmp_path)]
        assert loss.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    check_files(tmp_path)
    printed = capsys.readouterr().out
    assert "one shard of TP=2, no communication" in printed
    assert printed.count("ours, overwriting") > 2 and "not measured" in printed


def run_program(command: str, *more: str) -> str:
    """What a benchmark prints; `more` are words that may hold spaces."""
    done = warm.run(
        [sys.executable, *command.split(), *more],
        cwd=ROOT / "benchmarks",
        env={**os.environ, "PYTHONPATH": python_path()},
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_command_as_a_program(tmp_path):
    printed = run_program("loss.py", *SMALL, "--divergences", "1:none", "--out", str(tmp_path))
    check_files(tmp_path)
    assert "Collectives of one rank of two" in printed


def test_the_packing_benchmark_counts_the_tokens_of_both_kinds_of_rows():
    """2 prompts of 5 and 20 tokens, completions of 24 (the last is not computed): 28 + 43 tokens, padded 2 x 43."""
    printed = run_program("packing.py --sequences 2 --shortest 5 --longest 20 --max-tokens 64 --steps 1")
    title, padded, packed = printed.splitlines()
    assert title.endswith("71 tokens exist")
    assert "86 tokens (+21.1%)" in padded
    assert "71 tokens (+0.0%)" in packed


@pytest.mark.slow
def test_the_overlap_benchmark_measures_both_ways_of_reading():
    printed = run_program("overlap.py --groups 2 --steps 1 --hidden 64 --layers 1")
    deaf, hearing = (line.split() for line in printed.splitlines()[2:])
    assert " ".join(deaf[1:-3]) == "after the last was drawn"
    assert " ".join(hearing[1:-3]) == "while the next is drawn"
    for row in (deaf, hearing):
        step, drawing, waiting = map(float, row[-3:])
        assert step > drawing + waiting > 0


def test_the_steps_of_random_models_are_steps_of_the_trainer(tmp_path):
    """Tokens are counted by hand, and the loss falls."""
    options = "--student tiny --teacher tiny --sequences 4 --prompt 8 --completion 8 --steps 3 --fp32"
    run_program(f"step.py {options} --out", str(tmp_path / "step.json"))
    figures = json.loads((tmp_path / "step.json").read_text())
    assert {name: phase["tokens"] for name, phase in figures["phases"].items()} == {
        "rollout": 4 * 8,
        "teacher": 4 * 15,
        "train": 4 * 15,
    }
    losses = figures["losses"]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    assert losses[2] < losses[0]
