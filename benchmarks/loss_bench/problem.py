"""One cell of the benchmark: its inputs, and the exact answer in fp64.

Everything is drawn from a seed, on the device. The models resemble each other as a student and its teacher do: common
logits, a few hot columns a token, and a disagreement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from renio_megatron import VocabShard, WeightingConfig
from renio_megatron.objective.reference import reference_objective

SEQUENCE = 512
EXACT_ENTRIES = 1 << 24
WEIGHTING = WeightingConfig(name="renio", threshold=0.8, ceiling=2.5)
ROUNDINGS = 8
"""An entry within so many fp32 roundings of a bound may be clipped or not; its gradient is not compared."""


@dataclass(frozen=True)
class Cell:
    """A shape and a divergence.

    Attributes:
        tokens: N.
        width: columns of the logits L; one shard of a vocabulary of about `width` x `tp`.
        tp: ranks that the vocabulary is cut over; one of them is measured.
        beta, clip: of `LossConfig`; the floor is 0.
        dtype: of logits, hidden states and heads.
        hidden, teacher_hidden: 0 where logits are given, else the widths of both models.
        trained: whether the student's head has a gradient, too.
    """

    tokens: int
    width: int
    tp: int = 1
    beta: float = 0.0
    clip: float | None = None
    dtype: torch.dtype = torch.bfloat16
    hidden: int = 0
    teacher_hidden: int = 0
    trained: bool = True

    @property
    def kind(self) -> str:
        return "linear" if self.hidden else "logits"

    @property
    def entries(self) -> int:
        return self.tokens * self.width

    @property
    def divergence(self) -> str:
        return {0.0: "forward KL", 1.0: "reverse KL"}.get(self.beta, "JSD")

    @property
    def num_sequences(self) -> int:
        """About one for 512 tokens; at least 2, all of one length, so that a mean over tokens is the batch's mean."""
        most = min(self.tokens, max(2, self.tokens // SEQUENCE))
        return next(n for n in range(most, 0, -1) if self.tokens % n == 0)

    @property
    def title(self) -> str:
        divergence = self.divergence + (f"({self.beta:g})" if self.divergence == "JSD" else "")
        where = f"one shard of TP={self.tp}, no communication" if self.tp > 1 else "TP=1"
        parts = [f"N={self.tokens}", f"L={self.width} ({where})", divergence, f"clip {self.clip or 'none'}"]
        if self.hidden:
            head = "trained" if self.trained else "frozen"
            parts.append(f"hidden {self.hidden}, teacher {self.teacher_hidden}, {head} head")
        return ", ".join([*parts, str(self.dtype).removeprefix("torch.")])


@dataclass
class Problem:
    """The inputs of a cell. Logits [N, L], or hidden states [N, H] and heads [L, H]; token_ids, owner int64 [N].

    `weights` [B] are ReNIO's, from fp64, for schemes that take weights and do not compute them; `divergence` is exact,
    fp64 [N].
    """

    cell: Cell
    token_ids: torch.Tensor
    owner: torch.Tensor
    student_logits: torch.Tensor | None = None
    teacher_logits: torch.Tensor | None = None
    student_hidden: torch.Tensor | None = None
    student_head: torch.Tensor | None = None
    teacher_hidden: torch.Tensor | None = None
    teacher_head: torch.Tensor | None = None
    weights: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    divergence: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    shard: VocabShard | None = None

    @property
    def num_sequences(self) -> int:
        return self.cell.num_sequences

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.shard is None else self.shard.group

    def scale(self, *, weighted: bool) -> torch.Tensor:
        """What each token's divergence is multiplied by in the loss, [N]."""
        weights = self.weights if weighted else torch.ones_like(self.weights)
        return weights[self.owner] / self.cell.tokens

    def leaves(self) -> list[torch.Tensor]:
        """The tensors that have a gradient."""
        if self.cell.kind == "logits":
            return [self.student_logits]
        return [self.student_hidden, self.student_head] if self.cell.trained else [self.student_hidden]

    def rows(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Both models' logits of some tokens in fp64, not rounded where they come from heads."""
        if self.cell.kind == "logits":
            return self.student_logits[rows].detach().double(), self.teacher_logits[rows].double()
        student = self.student_hidden[rows].detach().double() @ self.student_head.detach().double().T
        return student, self.teacher_hidden[rows].double() @ self.teacher_head.double().T


def make_problem(cell: Cell, device: torch.device, seed: int = 0) -> Problem:
    """The inputs of `cell`, the same for the same seed, kind of device and shape."""
    generator = torch.Generator(device).manual_seed(seed)
    length = cell.tokens // cell.num_sequences
    owner = torch.arange(cell.tokens, device=device) // length
    token_ids = torch.randint(0, cell.width, (cell.tokens,), generator=generator, device=device)
    problem = Problem(cell, token_ids, owner)
    (_draw_heads if cell.hidden else _draw_logits)(problem, generator)
    exact = list(exact_tokens(problem))
    problem.divergence = torch.cat([tokens.divergence for tokens in exact])
    ratio = torch.cat([tokens.log_ratio for tokens in exact])
    problem.weights = renio_weights(ratio, owner, cell.num_sequences).float()
    for leaf in problem.leaves():
        leaf.requires_grad_()
    return problem


def _draw_logits(problem: Problem, generator: torch.Generator) -> None:
    cell, device = problem.cell, problem.owner.device
    problem.student_logits = torch.empty(cell.tokens, cell.width, dtype=cell.dtype, device=device)
    problem.teacher_logits = torch.empty_like(problem.student_logits)
    push = 2.5 + math.log(cell.width)  # the sampled token has a probability of about one half
    for rows in row_chunks(cell.tokens, cell.width):
        common = 2.0 * torch.randn(rows.stop - rows.start, cell.width, generator=generator, device=device)
        common.scatter_add_(1, problem.token_ids[rows, None], torch.full_like(common[:, :1], push))
        for logits in (problem.student_logits, problem.teacher_logits):
            logits[rows] = common + torch.randn(common.shape, generator=generator, device=device)


def _draw_heads(problem: Problem, generator: torch.Generator) -> None:
    """Heads whose first columns are common to both models, so that the teacher's logits resemble the student's."""
    cell, device = problem.cell, problem.owner.device

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    shared = min(cell.hidden, cell.teacher_hidden)
    student_head = normal(cell.width, cell.hidden) * (2.0 / cell.hidden**0.5)
    teacher_head = normal(cell.width, cell.teacher_hidden) * (1.0 / cell.teacher_hidden**0.5)
    teacher_head[:, :shared] = student_head[:, :shared]
    # Adding the sampled token's row of the head adds that row's squared length, 4, to its logit.
    student_hidden = normal(cell.tokens, cell.hidden) + student_head[problem.token_ids]
    teacher_hidden = normal(cell.tokens, cell.teacher_hidden)
    teacher_hidden[:, :shared] = student_hidden[:, :shared] + 0.3 * teacher_hidden[:, :shared]
    problem.student_hidden, problem.student_head = student_hidden.to(cell.dtype), student_head.to(cell.dtype)
    problem.teacher_hidden, problem.teacher_head = teacher_hidden.to(cell.dtype), teacher_head.to(cell.dtype)


def sharded(problem: Problem, rank: int, ranks: int, group: dist.ProcessGroup) -> Problem:
    """This rank's part of a whole problem over logits: equal shards in rank order."""
    width = problem.cell.width // ranks
    assert problem.cell.kind == "logits" and width * ranks == problem.cell.width
    columns = slice(rank * width, (rank + 1) * width)
    return dataclasses.replace(
        problem,
        student_logits=problem.student_logits.detach()[:, columns].contiguous().requires_grad_(),
        teacher_logits=problem.teacher_logits[:, columns].contiguous(),
        shard=VocabShard(columns.start, columns.stop, problem.cell.width, group),
    )


def row_chunks(rows: int, width: int, entries: int | None = None) -> Iterator[slice]:
    """Slices of rows that hold about `entries` entries each; None: `EXACT_ENTRIES`."""
    step = max(1, (entries or EXACT_ENTRIES) // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


@dataclass(frozen=True)
class ExactTokens:
    """Some tokens in fp64, by `objective/reference.py`: divergence, log ratio [n], d divergence / d logits [n, L]."""

    rows: slice
    divergence: torch.Tensor
    log_ratio: torch.Tensor
    gradient: torch.Tensor | None
    at_a_bound: torch.Tensor | None


def exact_tokens(problem: Problem, *, with_gradient: bool = False) -> Iterator[ExactTokens]:
    """The exact values of all tokens, some rows at a time."""
    cell = problem.cell
    for rows in row_chunks(cell.tokens, cell.width):
        student, teacher = problem.rows(rows)
        student.requires_grad_(with_gradient)
        owner = torch.zeros(len(student), dtype=torch.int64, device=student.device)
        out = reference_objective(
            student,
            teacher,
            problem.token_ids[rows],
            owner,
            1,
            beta=cell.beta,
            entry_clip=cell.clip,
            uniform=True,
        )
        gradient = bound = None
        if with_gradient:
            (gradient,) = torch.autograd.grad(out["loss"], student)
            gradient *= len(student)  # the loss above is the mean of these tokens
            bound = None if cell.clip is None else _at_a_bound(student.detach(), teacher, cell)
        yield ExactTokens(rows, out["token_divergence"], out["log_ratio"], gradient, bound)


def renio_weights(log_ratio: torch.Tensor, owner: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """ReNIO's weights over the batch mean, capped, written out from the log ratios; [B] in their dtype."""
    clipped = log_ratio.clamp(max=WEIGHTING.ceiling)
    pivotal = (clipped >= WEIGHTING.threshold).to(log_ratio.dtype)
    zeros = log_ratio.new_zeros(num_sequences)
    count = zeros.index_add(0, owner, pivotal)
    raw = (zeros.index_add(0, owner, pivotal * clipped) / count.clamp(min=1) / WEIGHTING.temperature).exp()
    return (raw / raw.mean()).clamp(max=WEIGHTING.cap)


def _at_a_bound(student: torch.Tensor, teacher: torch.Tensor, cell: Cell) -> torch.Tensor:
    """Entries whose clip fp32 may decide differently than fp64, bool [n, L]."""
    student_logp, teacher_logp = student.log_softmax(-1), teacher.log_softmax(-1)
    student, teacher = student_logp.exp(), teacher_logp.exp()
    if cell.beta == 0:
        entry = teacher * (teacher_logp - student_logp)
    elif cell.beta == 1:
        entry = student * (student_logp - teacher_logp)
    else:
        mixture = ((1 - cell.beta) * student + cell.beta * teacher).log()
        entry = cell.beta * teacher * (teacher_logp - mixture) + (1 - cell.beta) * student * (student_logp - mixture)
    unit = torch.finfo(torch.float32).eps * (1 + student_logp.abs() + teacher_logp.abs()) * (student + teacher)
    return torch.minimum(entry.abs(), (entry - cell.clip).abs()) <= ROUNDINGS * unit
