"""Which cells are measured, and the loop that fills a row for each scheme of each cell."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loss_bench import measure
from loss_bench.exact import Exact
from loss_bench.measure import Clock
from loss_bench.problem import Cell, Problem, make_problem
from loss_bench.schemes import FUSED, SCHEMES, Scheme, declared_buffers, fused_linear

VOCAB = 151936
FULL = tuple(itertools.product((0.0, 0.5, 1.0), (None, 0.05)))
QUICK = ((0.0, None), (0.0, 0.05), (0.5, None), (0.5, 0.05), (1.0, None))
QUICK_LINEAR = ((0.0, 0.05), (0.5, None))
MEMORY_CHUNK = 2048

Row = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """Shapes and divergences. `divergences`: (beta, clip) of the cells with logits; `linear`: of those with heads.

    `memory`: the two numbers of tokens at which the fused form's memory is compared, empty for no such rows.
    """

    shapes: Sequence[tuple[int, int]]
    tp: Sequence[int]
    hidden: Sequence[tuple[int, int]]
    dtype: torch.dtype
    divergences: Sequence[tuple[float, float | None]] = FULL
    linear: Sequence[tuple[float, float | None]] = FULL
    memory: Sequence[int] = ()
    memory_chunk: int = MEMORY_CHUNK

    def cells(self) -> Iterator[Cell]:
        """Cells, those of a whole vocabulary first; logits before heads."""
        for tp, (tokens, vocab) in itertools.product(self.tp, self.shapes):
            shape = Cell(tokens, -(-vocab // tp), tp, dtype=self.dtype)
            for beta, clip in self.divergences:
                yield dataclasses.replace(shape, beta=beta, clip=clip)
            for (hidden, teacher), (beta, clip), trained in itertools.product(self.hidden, self.linear, (True, False)):
                yield dataclasses.replace(
                    shape, beta=beta, clip=clip, hidden=hidden, teacher_hidden=teacher, trained=trained
                )


def full_grid() -> Grid:
    """The grid of a GPU."""
    shapes = [(tokens, VOCAB) for tokens in (1024, 2048, 4096, 8192, 16384)]
    return Grid(shapes, (1, 2, 4, 8), ((2048, 4096), (2048, 5120)), torch.bfloat16, memory=(4096, 8192))


def quick_grid() -> Grid:
    """What checks a GPU in a few minutes."""
    return Grid([(8192, VOCAB)], (1, 8), ((2048, 4096),), torch.bfloat16, QUICK, QUICK_LINEAR, (4096, 8192))


def cpu_grid() -> Grid:
    """Small shapes in fp32, which is what CPUs are trained in."""
    return Grid([(512, 32768)], (1, 8), ((128, 256),), torch.float32, QUICK, QUICK_LINEAR, (256, 512), 128)


@dataclass
class Bench:
    """The loop over cells and schemes. `deadline`: no cell is begun after this moment of `time.monotonic`."""

    device: torch.device
    repeats: int
    warm_up: int
    deadline: float = float("inf")
    copy_rate: float = 0.0
    rows: list[Row] = field(default_factory=list)
    left_out: int = 0
    schemes: Sequence[Scheme] = field(default_factory=lambda: SCHEMES)

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        self.copy_rate = measure.copy_bandwidth(self.device, self.clock, self.repeats)

    def cell(self, cell: Cell) -> list[Row]:
        """The rows of one cell, one for each scheme of its kind; also added to `rows`."""
        if time.monotonic() > self.deadline:
            self.left_out += 1
            return []
        return list(self.rows_of(cell))

    def rows_of(self, cell: Cell, is_wanted: Callable[[Scheme], bool] = lambda scheme: True) -> Iterator[Row]:
        """The same one by one, as they are measured; only of schemes that are wanted."""
        schemes = [scheme for scheme in self.schemes if scheme.kind == cell.kind and is_wanted(scheme)]
        measure.free(self.device)
        try:
            problem = make_problem(cell, self.device) if schemes else None
        except torch.cuda.OutOfMemoryError:
            problem = None
        exact = gemm = None
        if problem is not None:
            exact, gemm = Exact(problem), self._bare_gemms(problem)
        for scheme in schemes:
            row = _row(cell, scheme, "OOM")
            if problem is not None and exact is not None:
                row = self.scheme(scheme, problem, exact, gemm)
            self.rows.append(row)
            yield row

    def _bare_gemms(self, problem: Problem) -> tuple[float, float] | None:
        """`measure.bare_gemms`; None without heads, or where one buffer for all logits does not fit."""
        try:
            return measure.bare_gemms(problem, self.clock, self.repeats) if problem.cell.hidden else None
        except torch.cuda.OutOfMemoryError:
            return None

    def scheme(self, scheme: Scheme, problem: Problem, exact: Exact, gemm: tuple[float, float] | None) -> Row:
        """One row: everything that is measured, or why it is not."""
        cell = problem.cell
        if reason := scheme.refusal(cell, self.device):
            return _row(cell, scheme, reason)
        measure.free(self.device)
        try:
            row = _row(cell, scheme, "ok")
            ready = dataclasses.replace(scheme, forward=scheme.prepare(scheme.forward))
            self._add_errors(row, ready, problem, exact)
            memory = measure.memory_of(ready, problem)
            timing = measure.time_scheme(ready, problem, self.clock, repeats=self.repeats, warm_up=self.warm_up)
        except torch.cuda.OutOfMemoryError:
            return _row(cell, scheme, "OOM")
        except Exception as error:  # one scheme's fault must not take the other rows with it
            return _row(cell, scheme, "error") | {"message": f"{type(error).__name__}: {error}"}
        row |= {f"{name}_s": getattr(timing, name) for name in ("forward", "backward", "both")}
        row |= {"repeats": timing.repeats, "peak_bytes": memory.peak, "result_bytes": memory.results}
        if not cell.hidden:
            per_entry = timing.both * self.copy_rate / cell.entries
            row |= {"bytes_per_entry": per_entry, "copy_share": measure.floor_bytes(cell) / per_entry}
        elif gemm is not None:
            row |= {"gemm_s": gemm[0], "gemm_flops": gemm[1], "gemm_share": gemm[0] / timing.both}
        return row

    def _add_errors(self, row: Row, scheme: Scheme, problem: Problem, exact: Exact) -> None:
        """Errors against fp64; None where their computation does not fit."""
        loss, gradients = measure.run_once(scheme, measure.working_copy(scheme, problem))
        try:
            errors = exact.errors(float(loss), gradients, weighted=scheme.weights != "none")
        except torch.cuda.OutOfMemoryError:
            return
        row |= {"loss_error": errors.loss, "gradient_error": errors.gradient, "at_a_bound": errors.at_a_bound}

    def fused_memory(self, grid: Grid) -> list[Row]:
        """Memory of the fused form at two numbers of tokens and one size of chunk, apart from what it returns."""
        hidden, teacher = grid.hidden[0]
        shape = Cell(0, grid.shapes[0][1], 1, 0.0, 0.05, grid.dtype, hidden, teacher)
        rows = []
        for tokens, trained in itertools.product(grid.memory, (True, False)):
            cell = dataclasses.replace(shape, tokens=tokens, trained=trained)
            found = {dtype: _row(cell, s, s.refusal(cell, self.device) or "ok") for dtype, s in FUSED.items()}
            measure.free(self.device)
            problem = make_problem(cell, self.device) if any(row["status"] == "ok" for row in found.values()) else None
            for dtype, row in found.items():
                row["kind"] = "memory"
                if row["status"] == "ok" and problem is not None:
                    row |= self._fused_memory(problem, dtype, grid.memory_chunk)
                rows.append(row)
        self.rows += rows
        return rows

    def _fused_memory(self, problem: Problem, dtype: torch.dtype, chunk: int) -> Row:
        """`_memory_beside_results`, or why there is none."""
        measure.free(self.device)
        try:
            return _memory_beside_results(problem, dtype, chunk)
        except torch.cuda.OutOfMemoryError:
            return {"status": "OOM"}
        except Exception as error:
            return {"status": "error", "message": f"{type(error).__name__}: {error}"}


def _memory_beside_results(problem: Problem, dtype: torch.dtype, chunk: int) -> Row:
    """Peak bytes apart from gradients and the vectors of the output, and what was declared.

    The head's gradient counts in fp32, which is what it is summed in, whatever dtype it is handed over in.
    """
    returned = 0

    def call() -> None:
        nonlocal returned
        out = fused_linear(problem, dtype, chunk)
        gradients = torch.autograd.grad(out.loss, problem.leaves())
        tensors = [value for value in vars(out).values() if isinstance(value, torch.Tensor)]
        head = 4 * sum(gradient.numel() for gradient in gradients[1:])
        returned = head + sum(tensor.untyped_storage().nbytes() for tensor in [*tensors, gradients[0]])

    call()  # what is allocated once for all calls is no buffer of one
    peak = measure.peak_bytes(call, problem.owner.device)
    declared = declared_buffers(problem.cell, dtype, chunk)
    return {"peak_bytes": peak, "extra_bytes": peak - returned, "declared_bytes": declared, "chunk": chunk}


def _row(cell: Cell, scheme: Scheme, status: str) -> Row:
    return {
        "kind": cell.kind,
        "title": cell.title,
        "tokens": cell.tokens,
        "width": cell.width,
        "tp": cell.tp,
        "beta": cell.beta,
        "clip": cell.clip,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "hidden": cell.hidden,
        "teacher_hidden": cell.teacher_hidden,
        "head": ("trained" if cell.trained else "frozen") if cell.hidden else None,
        "scheme": scheme.name,
        "weights": scheme.weights,
        "status": status,
    }
