"""Inputs that a weighting declares, collected for a rank's rollouts, and the resulting weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from renio_megatron.config import HeadConfig, LossConfig, WeightingConfig
from renio_megatron.config.sections.weighting import RenioWeighting
from renio_megatron.data.batching.collate import flat_completions, flat_logp, flat_positions
from renio_megatron.data.prompts import number_in
from renio_megatron.losses.sample_weights import SampleWeights, sample_weights
from renio_megatron.objective.weightings import COLUMN, LOGIT_INPUTS
from renio_megatron.objective.weightings.strategy import seeded
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.training.interfaces import Learner, ScoreMore
from renio_megatron.training.targets import LossInputs, TeacherTargets
from renio_megatron.types import MicroBatch, Prompt, Rollout, Verdict

Verdicts = Callable[[], Sequence[Verdict]]
"""() -> the grader's verdict on each of the rank's rollouts."""


@dataclass(frozen=True)
class Weighing:
    """Weights of sequences and tokens, and the scores that they need.

    Attributes:
        weighting: the strategies.
        report: ReNIO's bounds for the reported metrics; None: no report.
        loss, head: the divergence, and how logits are computed, for inputs that follow from logits.
        recompute: take log p_S from a forward-only pass instead of the sampler.
        seed: seed of strategies that draw random numbers.
    """

    weighting: WeightingConfig
    report: RenioWeighting | None
    loss: LossConfig
    head: HeadConfig
    recompute: bool
    seed: int

    @property
    def of_logits(self) -> frozenset[str]:
        """Inputs of the weighting that only a scoring pass can compute."""
        return self.weighting.needs & LOGIT_INPUTS

    @property
    def needs_pass(self) -> bool:
        """Whether the student scores its completions in a forward-only pass before the update."""
        return self.recompute or bool(self.of_logits)

    def scores(
        self, rollouts: Sequence[Rollout], batches: Sequence[MicroBatch], learner: Learner, targets: TeacherTargets
    ) -> dict[str, torch.Tensor]:
        """`student_logp` and the other inputs that follow from logits, [N]; a forward-only pass where one is needed."""
        is_known = not self.recompute and all(rollout.logp is not None for rollout in rollouts)
        known = {"student_logp": flat_logp(rollouts)} if is_known else {}
        wanted = self.of_logits | ({"student_logp"} - known.keys())
        if not wanted:
            return known

        def values_of(
            index: int, micro_batch: MicroBatch, hidden: torch.Tensor, head: LmHead
        ) -> Mapping[str, torch.Tensor]:
            nothing = hidden.new_zeros(len(micro_batch.target_ids), dtype=torch.float32)
            inputs = LossInputs(hidden, head, nothing, None, self.loss, self.head)
            return targets.token_inputs(wanted, index, micro_batch, inputs)

        return {
            **known,
            **learner.score(batches, ScoreMore(tuple(sorted(wanted)), values_of) if self.of_logits else None),
        }

    def weights(
        self,
        rollouts: Sequence[Rollout],
        scores: Mapping[str, torch.Tensor],
        targets: TeacherTargets,
        layout: ParallelLayout,
        *,
        step: int,
        state: torch.Tensor | None,
        verdicts: Verdicts,
    ) -> SampleWeights:
        """Weights of this rank's sequences, normalized over the optimizer step's.

        Args:
            rollouts: this rank's rollouts.
            scores: result of `scores`.
            targets: the teacher's targets for them.
            layout: the device, and the groups that share the batch.
            step: number of the step.
            state: state of the previous step.
            verdicts: called where a strategy needs them.
        """
        device = layout.device
        _, owner, _ = flat_completions(rollouts)
        found = {name: values.to(device) for name, values in scores.items()}
        student_logp, teacher_logp = found.pop("student_logp"), targets.logp.to(device)
        if targets.has_logp is not None:
            teacher_logp = torch.where(targets.has_logp.to(device), teacher_logp, student_logp)
        return sample_weights(
            student_logp,
            teacher_logp,
            owner.to(device),
            len(rollouts),
            self.weighting,
            batch_group=layout.data.group,
            state=state,
            inputs=found | self._inputs(rollouts, step, layout, verdicts),
            report=self.report,
        )

    def _inputs(
        self, rollouts: Sequence[Rollout], step: int, layout: ParallelLayout, verdicts: Verdicts
    ) -> dict[str, Any]:
        """Inputs of the weighting that are known from the rollouts, and no others."""
        numbers = [rollout.prompt.index for rollout in rollouts]
        known: dict[str, Callable[[], Any]] = {
            "sampler_logp": lambda: flat_logp(rollouts),
            "position": lambda: flat_positions(rollouts),
            "finished": lambda: torch.tensor([rollout.finished for rollout in rollouts]),
            "verdict": lambda: torch.tensor([_as_number(verdict) for verdict in verdicts()]),
            "prompt_group": lambda: torch.tensor([_group_of(rollout.prompt) for rollout in rollouts]),
            "sequence": lambda: torch.tensor(numbers),
            "generator": lambda: seeded(self.seed, step),
            "step": lambda: step,
        }
        needs = self.weighting.needs
        found = {name: make() for name, make in known.items() if name in needs}
        for name in (need for need in needs if need.startswith(COLUMN)):
            found[name] = torch.tensor(
                [number_in(rollout.prompt, name.removeprefix(COLUMN)) for rollout in rollouts], dtype=torch.float64
            )
        return {name: one.to(layout.device) if isinstance(one, torch.Tensor) else one for name, one in found.items()}


def _as_number(verdict: Verdict) -> float:
    """1 right, 0 wrong, NaN where the grader failed."""
    return float("nan") if verdict.correct is None else float(verdict.correct)


def _group_of(prompt: Prompt) -> int:
    """A number in [0, 2^63) that prompts of the same text have in common, on every rank."""
    text = ",".join(map(str, prompt.student_ids)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
