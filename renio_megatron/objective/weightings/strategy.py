"""Interface of weighting strategies: their inputs and their results.

A strategy is made from its settings (`config/sections/weighting.py`), which declare its inputs. It has two halves.
`sums` are additive over the tokens of a sequence, so that pieces of one on several ranks may be added; `weights`
computes weights from them. A strategy whose weights do not follow from such sums sets `is_additive` to False, and sees
whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from renio_megatron.objective.weightings import COLUMN, INPUTS


class WeightingInputs:
    """Inputs of a strategy for the sequences of a step, or for the pieces of them on this rank.

    It has only the inputs that the settings declare. No gradients; floats are fp32 or fp64.

    Attributes:
        owner: sequence of each token, int64 [N] in [0, num_sequences), any order.
        num_sequences: B.
        lengths: completion tokens of each whole sequence [B].
        student_logp, teacher_logp: log-probability of each sampled token at the loss temperature, nats [N]. Where a
            teacher lacks the token, its value is the student's.
        sampler_logp: log-probability of each sampled token at sampling time, nats [N].
        student_entropy, teacher_entropy: entropy of each model's distribution at each token, over the whole vocabulary
            at the loss temperature, nats [N].
        divergence: divergence of each token as in the loss, with its bounds, unweighted, nats [N].
        position: place of each token in its completion, from 0, int64 [N].
        finished: whether the completion ended by itself, bool [B].
        verdict: the grader's result: 1 right, 0 wrong, NaN where it failed [B].
        prompt_group: equal numbers for equal student prompts, int64 [B].
        sequence: number of each sequence in the step, the same in every layout, int64 [B].
        generator: (numbers...) -> a CPU generator seeded by the run, the step and these numbers.
        step: optimizer step, from 1.
    """

    owner: torch.Tensor
    num_sequences: int
    lengths: torch.Tensor
    student_logp: torch.Tensor
    teacher_logp: torch.Tensor
    sampler_logp: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    divergence: torch.Tensor
    position: torch.Tensor
    finished: torch.Tensor
    verdict: torch.Tensor
    prompt_group: torch.Tensor
    sequence: torch.Tensor
    generator: Callable[..., torch.Generator]
    step: int

    def __init__(self, owner: torch.Tensor, num_sequences: int, values: Mapping[str, Any]) -> None:
        """`values` holds the declared inputs by their names in `INPUTS` or `column NAME`; the lengths are set later."""
        self.owner, self.num_sequences, self.values = owner, num_sequences, dict(values)
        for name in INPUTS:
            if name in values:
                setattr(self, name, values[name])

    def __getattr__(self, name: str) -> Any:
        """Raises the error of an input that was not declared."""
        if name in INPUTS:
            raise AttributeError(
                f"a weighting reads {name} and does not declare it: add it to `needs` of its settings."
            )
        raise AttributeError(name)

    def only(self, names: Collection[str]) -> WeightingInputs:
        """The inputs restricted to these names."""
        return WeightingInputs(self.owner, self.num_sequences, {name: self.values[name] for name in names})

    def column(self, name: str) -> torch.Tensor:
        """A numeric column of the sequences' records [B]; declared as `column NAME`."""
        if f"{COLUMN}{name}" not in self.values:
            raise AttributeError(
                f"a weighting reads the column {name!r} and does not declare it: add {COLUMN + name!r} to `needs` of "
                "its settings."
            )
        return self.values[f"{COLUMN}{name}"]

    def sum_of(self, values_N: torch.Tensor) -> torch.Tensor:
        """Sum over each sequence's tokens on this rank, [B]."""
        return values_N.new_zeros(self.num_sequences).index_add_(0, self.owner, values_N)


@dataclass(frozen=True)
class RawWeights:
    """Result of a strategy before normalization; the same fields are None on every rank.

    Attributes:
        sequences: raw weight of each sequence [B]; None: all 1.
        tokens: raw weight of each token [N], which multiplies its divergence in the mean over its sequence's tokens;
            None: all 1.
        kept: the tokens that the mean is over, bool [N]: others count neither in its numerator nor in its denominator;
            None: all.
    """

    sequences: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    kept: torch.Tensor | None = None


class Strategy:
    """Base class of strategies; every weight is 1.

    Attributes:
        is_additive: whether `sums` of pieces may be added. If not, `weights` gets whole sequences, and no sums.
        rearranges: whether normalized weights are passed to `sequences` and `tokens`.
    """

    is_additive: bool = True
    rearranges: ClassVar[bool] = False

    def __init__(self, settings: Any) -> None:
        """Stores its `WeightingConfig`."""
        self.settings = settings

    def sums(self, inputs: WeightingInputs) -> dict[str, torch.Tensor]:
        """Values of each sequence [B] by name, summed over its tokens on this rank."""
        return {}

    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        """The raw weights of these tokens and their sequences, from the sums over whole sequences."""
        return RawWeights()

    def sequences(self, weights_B: torch.Tensor, ids_B: torch.Tensor, inputs: WeightingInputs) -> torch.Tensor:
        """Normalized weights of all sequences of the step, rearranged; in any order, `ids_B` are their numbers."""
        return weights_B

    def tokens(self, weights_N: torch.Tensor, inputs: WeightingInputs) -> torch.Tensor:
        """Normalized weights of the tokens, rearranged; of whole sequences where the strategy is not additive."""
        return weights_N


def seeded(*numbers: int) -> Callable[..., torch.Generator]:
    """(more numbers) -> a CPU generator seeded by all of the numbers.

    >>> draw = seeded(5, 1); first = torch.rand(2, generator=draw(7))
    >>> bool((torch.rand(2, generator=draw(7)) == first).all()), bool((torch.rand(2, generator=draw(8)) == first).any())
    (True, False)
    """

    def make(*more: int) -> torch.Generator:
        # A spawn key, because numpy drops trailing zeros of the entropy: (5, 1) and (5, 1, 0) would be the same.
        seed = np.random.SeedSequence(numbers, spawn_key=more).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed >> np.uint64(1)))

    return make
