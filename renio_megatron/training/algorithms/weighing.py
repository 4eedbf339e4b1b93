"""What a weighting declares, brought together for a rank's rollouts, and the weights that follow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from renio_megatron.config import HeadConfig, LossConfig, WeightingConfig
from renio_megatron.config.sections.weighting import RenioWeighting
from renio_megatron.data.batching.collate import flat_completions, flat_logp
from renio_megatron.data.prompts import number_in
from renio_megatron.losses.sample_weights import SampleWeights, sample_weights
from renio_megatron.objective.weightings import COLUMN, LOGIT_INPUTS
from renio_megatron.objective.weightings.strategy import seeded
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.reductions import of_first_model_rank
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.training.interfaces import Learner, ScoreMore
from renio_megatron.training.targets import LossInputs, TeacherTargets
from renio_megatron.types import MicroBatch, Prompt, Rollout

Verdicts = Callable[[], Sequence[bool | None]]
"""() -> of the grader about each of the rank's rollouts."""


@dataclass(frozen=True)
class Weighing:
    """How sequences and tokens are weighed.

    Attributes:
        weighting: the strategies.
        report: bounds under which ReNIO tells of the sequences; None: nobody asks.
        loss, head: the divergence, and how logits are made, for what follows from logits.
        recompute: take log p_S from a forward-only pass instead of the sampler.
        seed: of strategies that draw.
    """

    weighting: WeightingConfig
    report: RenioWeighting | None
    loss: LossConfig
    head: HeadConfig
    recompute: bool
    seed: int

    @property
    def of_logits(self) -> frozenset[str]:
        """What the weighting needs that only a scoring pass can tell."""
        return self.weighting.needs & LOGIT_INPUTS

    @property
    def needs_pass(self) -> bool:
        """Whether the student reads its completions once more before it is updated."""
        return self.recompute or bool(self.of_logits)

    def scores(
        self, rollouts: Sequence[Rollout], batches: Sequence[MicroBatch], learner: Learner, targets: TeacherTargets
    ) -> dict[str, torch.Tensor]:
        """`student_logp` and what else follows from logits, [N]; a forward-only pass where one is needed."""
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
            rollouts: this rank's.
            scores: of `scores`.
            targets: what the teacher says of them.
            layout: where tensors are, and with whom the batch is shared.
            step: number of the step.
            state: of the step before.
            verdicts: asked where a strategy wants them.
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
        """What the weighting needs that is known of the rollouts, and nothing else."""
        numbers = [rollout.prompt.index for rollout in rollouts]
        known: dict[str, Callable[[], Any]] = {
            "sampler_logp": lambda: flat_logp(rollouts),
            "position": lambda: torch.cat([torch.arange(len(one.completion_ids)) for one in rollouts]),
            "finished": lambda: torch.tensor([rollout.finished for rollout in rollouts]),
            "verdict": lambda: _agreed(verdicts(), layout),
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


def _agreed(verdicts: Sequence[bool | None], layout: ParallelLayout) -> torch.Tensor:
    """1 right, 0 wrong, NaN where the grader failed, fp32 [B]; of the first rank, for a grader may not say the same
    twice, and ranks that share sequences must weigh them alike."""
    numbers = [-1.0 if one is None else float(one) for one in verdicts]
    agreed = of_first_model_rank(torch.tensor(numbers, device=layout.device), layout)
    return torch.where(agreed < 0, float("nan"), agreed)


def _group_of(prompt: Prompt) -> int:
    """A number in [0, 2^63) that prompts of the same text have in common, on every rank."""
    text = ",".join(map(str, prompt.student_ids)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
