"""How far a scheme's loss and gradients are from fp64, relative to the largest exact value."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loss_bench.problem import Problem, exact_tokens


@dataclass(frozen=True)
class Errors:
    """Relative errors; `at_a_bound`: share of entries within fp32 rounding of a clip bound, which are not compared."""

    loss: float
    gradient: float
    at_a_bound: float


class Exact:
    """The fp64 answer to one problem, computed when first asked for: weighted, or with every weight 1."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._linear = functools.cache(self._compute_linear)

    def errors(self, loss: float, gradients: Sequence[torch.Tensor], *, weighted: bool) -> Errors:
        """Errors of a scheme's results; gradients in the order of `Problem.leaves`."""
        exact = float((self.problem.scale(weighted=weighted).double() * self.problem.divergence).sum())
        loss_error = abs(loss - exact) / abs(exact)
        if self.problem.cell.kind == "logits":
            return Errors(loss_error, *self._logit_errors(gradients[0], weighted))
        pairs = zip(gradients, self._linear(weighted), strict=True)
        ratios = [_largest(found - expected) / _largest(expected) for found, expected in pairs]
        return Errors(loss_error, float(torch.stack(ratios).max()), 0.0)

    def _logit_errors(self, gradient: torch.Tensor, weighted: bool) -> tuple[float, float]:
        scale = self.problem.scale(weighted=weighted).double()
        differences, largest, bound = [], [], 0
        for tokens in exact_tokens(self.problem, with_gradient=True):
            expected = tokens.gradient.mul_(scale[tokens.rows, None])
            largest.append(_largest(expected))
            expected -= gradient[tokens.rows]
            if tokens.at_a_bound is not None:
                expected.masked_fill_(tokens.at_a_bound, 0.0)
                bound += int(tokens.at_a_bound.sum())
            differences.append(_largest(expected))
        error = torch.stack(differences).max() / torch.stack(largest).max()
        return float(error), bound / self.problem.cell.entries

    def _compute_linear(self, weighted: bool) -> list[torch.Tensor]:
        """Gradients of the student's hidden states and, where it is trained, head; from logits that nothing rounded."""
        problem = self.problem
        scale = problem.scale(weighted=weighted).double()
        hidden, head = problem.student_hidden.detach(), problem.student_head.detach().double()
        of_hidden = torch.empty(hidden.shape, dtype=torch.float64, device=hidden.device)
        of_head = torch.zeros_like(head) if problem.cell.trained else None
        for tokens in exact_tokens(problem, with_gradient=True):
            gradient = tokens.gradient.mul_(scale[tokens.rows, None])
            of_hidden[tokens.rows] = gradient @ head
            if of_head is not None:
                of_head.addmm_(gradient.T, hidden[tokens.rows].double())
        return [of_hidden] if of_head is None else [of_hidden, of_head]


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    """Largest absolute value, a scalar tensor; NaN where there is one."""
    return tensor.abs().max()
