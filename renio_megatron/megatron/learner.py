"""The student's weights and optimiser: Megatron's DDP, schedules and optimiser around our loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from renio_megatron.data.collate import collate
from renio_megatron.errors import NumericsError
from renio_megatron.megatron.model import ModelPart
from renio_megatron.megatron.pipeline import broadcast_from_last_stage, run_forward, run_forward_backward
from renio_megatron.metrics import Tally
from renio_megatron.parallel.batch import reduce_tally
from renio_megatron.records import MicroBatch, Rollout
from renio_megatron.roles import StepLoss
from renio_megatron.settings import TrainConfig
from renio_megatron.token_logp import token_logp


class MegatronLearner:
    """One model, wrapped in Megatron's DDP, and its optimiser.

    The step's gradient is (sum of the micro-batches' losses) / (sum of their denominators) over the whole batch: DDP
    sums, and the division happens once, in `finalize_model_grads_func`, by a denominator kept in fp64.

    Attributes:
        part: this rank's part of the model.
        model: the DDP wrapper.
        optimizer: Megatron's optimiser.
    """

    def __init__(self, part: ModelPart, train: TrainConfig, *, temperature: float, pad_id: int) -> None:
        """Wraps `part` for training; `temperature` is the loss's, for `score`."""
        self.part = part
        self._train = train
        self._temperature = temperature
        self._pad_id = pad_id
        self._denominator = torch.zeros((), dtype=torch.float64, device=part.layout.device)
        config = part.config
        self.model = DistributedDataParallel(
            config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), part.module
        )
        self.optimizer = get_megatron_optimizer(_optimizer_config(train, config.params_dtype), [self.model])
        config.finalize_model_grads_func = self._finalize_gradients
        config.no_sync_func = self.model.no_sync
        config.grad_scale_func = self.optimizer.scale_loss

    def score(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """log p_S of each sampled token at the loss temperature, forward-only, nats fp32 [N]."""
        part = self.part
        micro_batches = self._micro_batches(rollouts)

        def logp_of(index: int, micro_batch: MicroBatch, rows: torch.Tensor) -> torch.Tensor:
            return token_logp(part.head_logits(rows), micro_batch.target_ids, part.shard, temperature=self._temperature)

        self.model.eval()
        collected = run_forward(part, micro_batches, logp_of)
        count = sum(len(micro_batch.target_ids) for micro_batch in micro_batches)
        logp = torch.cat(collected) if collected else torch.empty(count, device=part.layout.device)
        return broadcast_from_last_stage(logp, part.layout)

    def update(self, rollouts: Sequence[Rollout], loss: StepLoss, *, step: int, lr: float) -> dict[str, float]:
        """One optimiser step on this rank's share of the batch.

        Raises:
            NumericsError: NaN or infinity in a loss or gradient; the weights are then left as they were.
        """
        part = self.part
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._denominator.zero_()

        def loss_of(index: int, micro_batch: MicroBatch, rows: torch.Tensor) -> tuple[torch.Tensor, Tally]:
            total, denominator, tally = loss(index, micro_batch, part.head_logits(rows), part.shard)
            if not math.isfinite(float(total.detach())):
                raise NumericsError(
                    f"step {step}, rank {part.layout.rank}: the loss of micro-batch {index} is "
                    f"{float(total.detach())}. Check the learning rate, the models' precision, and train.clip_grad."
                )
            self._denominator += denominator
            return total, tally

        tallies = run_forward_backward(part, self.model, self._micro_batches(rollouts), loss_of)
        self._check_gradients(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        total = Tally()
        for tally in tallies:
            total.merge(tally)
        metrics = reduce_tally(total, part.layout)
        return {**metrics, "grad_norm": float(grad_norm), "lr": lr}

    def _micro_batches(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        micro_batches = collate(
            rollouts,
            view="student",
            micro_batch_size=self._train.micro_batch_size,
            pad_id=self._pad_id,
            multiple_of=self.part.length_multiple,
        )
        return [micro_batch.to(self.part.layout.device) for micro_batch in micro_batches]

    def _finalize_gradients(self, model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
        """Megatron's reductions without its division, then the division by the whole batch's denominator.

        Megatron's own divisor is an integer on some versions and clamped to at least 1 on others.
        """
        finalize_model_grads(model, None, **kwargs)
        layout = self.part.layout
        denominator = broadcast_from_last_stage(self._denominator.clone(), layout)
        dist.all_reduce(denominator, group=layout.data.group)
        if denominator > 0:
            for chunk in model:
                chunk.scale_gradients(1.0 / float(denominator))

    def _check_gradients(self, step: int) -> None:
        """Stops every rank where any has a gradient that is not finite; names the first such parameter."""
        buffers = [*self.model.buffers, *self.model.expert_parallel_buffers]
        finite = all(bool(torch.isfinite(buffer.grad_data.sum())) for buffer in buffers)
        bad = torch.zeros((), device=self.part.layout.device)
        name = None
        if not finite:
            named = self.part.module.named_parameters()
            name = next((n for n, p in named if not bool(torch.isfinite(p.main_grad).all())), None)
            bad += name is not None
        dist.all_reduce(bad)
        if name is not None:
            raise NumericsError(
                f"step {step}, rank {self.part.layout.rank}: the gradient of {name} holds NaN or infinity. "
                "The weights were not changed. Check the learning rate and the data of this step."
            )
        if bad > 0:
            raise NumericsError(
                f"step {step}, rank {self.part.layout.rank}: stopped, another rank's gradient is not finite."
            )


def _optimizer_config(train: TrainConfig, dtype: torch.dtype) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=train.bf16,
        params_dtype=dtype,
    )
