"""The student's learner: Megatron's DDP, schedules and optimizer around the distillation loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.transformer_config import TransformerConfig

from renio_megatron.config import HeadConfig, LossConfig, ParallelConfig, TrainConfig
from renio_megatron.data.batching.collate import collate
from renio_megatron.errors import NumericsError, Scope
from renio_megatron.losses.token_logp import linear_token_logp
from renio_megatron.losses.tune_kernels import tune_cross_entropy, tune_loss
from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.megatron.model.schedules import (
    broadcast_from_last_stage,
    broadcast_token_values,
    run_forward,
    run_forward_backward,
)
from renio_megatron.megatron.model.te_modules import slow_attention
from renio_megatron.megatron.student.spare_rows import SpareRows
from renio_megatron.models.param_map import is_expert
from renio_megatron.parallel.reductions import sum_over_group
from renio_megatron.training.interfaces import ScoreMore, StepLoss
from renio_megatron.training.metrics.accumulator import MetricAccumulator, reduce_metrics
from renio_megatron.types import MicroBatch, Rollout

logger = logging.getLogger(__name__)

_DEFAULT_HEAD = HeadConfig()


class MegatronLearner:
    """One model, wrapped in Megatron's DDP, and its optimizer.

    The step's gradient is (sum of the micro-batches' losses) / (sum of their denominators) over the whole batch: DDP
    sums, and the division happens once, in `finalize_model_grads_func`, by a denominator kept in fp64.

    Attributes:
        part: this rank's part of the model.
        models: the DDP wrappers of its chunks.
        optimizer: Megatron's optimizer.
        spare_rows: rows beyond V, which its steps must not change.
    """

    def __init__(
        self,
        part: ModelPart,
        train: TrainConfig,
        parallel: ParallelConfig,
        head: HeadConfig = _DEFAULT_HEAD,
        *,
        temperature: float,
        pad_id: int,
        per_token: bool = False,
    ) -> None:
        """Wraps `part` for training; `temperature` and `head` are the loss's, for `score`.

        `per_token`: the loss's denominators count completion tokens instead of sequences; for the routers.
        """
        self.part = part
        if part.routing is not None and per_token:
            part.routing.count_tokens()
        self._head = head
        self._train = train
        self._temperature = temperature
        self._batch_layout = part.batch_layout(pad_id, train.micro_batch_size, train.max_tokens_per_micro_batch)
        self._denominator = torch.zeros((), dtype=torch.float64, device=part.layout.device)
        config = part.config
        wrapping = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            fp8_param_gather=config.fp8_param,
        )
        self.models = [
            DistributedDataParallel(config, wrapping, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(part.chunks)
        ]
        self.optimizer = get_megatron_optimizer(_optimizer_config(train, parallel, config), self.models)
        config.finalize_model_grads_func = self._finalize_gradients
        no_sync = [model.no_sync for model in self.models]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        config.grad_scale_func = self.optimizer.scale_loss
        self._is_stale = False
        self._overlaps_gather = parallel.overlap_param_gather
        self.spare_rows = SpareRows(part, self.optimizer)
        part.on_use(self._sync_params)
        self._has_looked = part.backend != "te" or not part.layout.is_main

    def optimizer_form(self) -> dict[str, bool]:
        """Settings that determine the format of the optimizer's state in a checkpoint, which is independent of the
        layout."""
        config = self.optimizer.config
        return {"parallel.use_distributed_optimizer": config.use_distributed_optimizer, "train.bf16": config.bf16}

    def make_micro_batches(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        """The rollouts as the student's micro-batches."""
        micro_batches = collate(rollouts, audience="student", batch_layout=self._batch_layout)
        return [micro_batch.to(self.part.layout.device) for micro_batch in micro_batches]

    def score(self, micro_batches: Sequence[MicroBatch], more: ScoreMore | None = None) -> dict[str, torch.Tensor]:
        """`student_logp` of each sampled token at the loss temperature, forward-only, nats fp32 [N]; or by name the
        values of `more`."""
        part, names = self.part, ("student_logp",) if more is None else more.names

        def scores_of(index: int, micro_batch: MicroBatch, rows: torch.Tensor) -> list[torch.Tensor]:
            if more is None:
                return [linear_token_logp(rows, part.head(), micro_batch.target_ids, self._head, self._temperature)]
            found = more.values_of(index, micro_batch, rows, part.head())
            return [found[name] for name in names]

        part.train(False)
        columns = list(zip(*run_forward(part, micro_batches, scores_of), strict=True)) or [()] * len(names)
        return {
            name: broadcast_token_values(column, micro_batches, part.layout)
            for name, column in zip(names, columns, strict=True)
        }

    def update(self, micro_batches: Sequence[MicroBatch], loss: StepLoss, *, step: int, lr: float) -> dict[str, float]:
        """One optimizer step on this rank's share of the batch.

        Raises:
            NumericsError: NaN or infinity in a loss or gradient; the weights are then unchanged.
        """
        accumulators = self._accumulate(micro_batches, loss, step)
        self._look_at_attention()
        skip = self._train.skip_nonfinite_steps
        bad = self._bad_gradient()
        if skip and bad[0]:
            return {"train/skipped_frac": 1.0, "lr": lr}
        self._require_finite(bad, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        self._is_stale = True
        total = MetricAccumulator()
        for accumulator in accumulators:
            total.merge(accumulator)
        metrics = reduce_metrics(total, self.part.layout)
        if self.part.routing is not None:
            metrics |= self.part.routing.metrics()
        skipped = {"train/skipped_frac": 0.0} if skip else {}
        return {**metrics, **skipped, "grad_norm": float(grad_norm), "lr": lr}

    def tune(self, num_tokens: int, loss: LossConfig | None, *, scores: bool = False) -> None:
        """Tunes the kernels of `update` with this loss (None: cross-entropy), and with `scores` of `score`, for
        micro-batches of at most `num_tokens` completion tokens. Does nothing on a rank without an LM head."""
        part = self.part
        if not part.layout.pipeline.is_last:
            return
        dtype, device = part.config.params_dtype, part.layout.device
        shared: dict[str, Any] = {"hidden_dtype": dtype, "num_tokens": num_tokens, "device": device}
        if scores:
            part.tune_scores(self._head, self._temperature, num_tokens)
        if loss is None:
            tune_cross_entropy(part.shard, **shared)
        else:
            tune_loss(part.shard, loss, self._head, hidden_size=part.config.hidden_size, **shared)

    def gradients(self, micro_batches: Sequence[MicroBatch], loss: StepLoss) -> dict[str, torch.Tensor]:
        """The gradient that `update` would pass to the optimizer, unclipped; the weights are not changed.

        Copies of the gradients of this rank's parameters, fp32 on the CPU, such that every element of the whole model
        is on exactly one rank. Without the distributed optimizer only.

        Raises:
            NumericsError: NaN or infinity in a loss or gradient.
        """
        assert not self.optimizer.config.use_distributed_optimizer  # a rank would hold a shard of the sum
        self._accumulate(micro_batches, loss, 0)
        self._require_finite(self._bad_gradient(), 0)
        layout = self.part.layout
        is_first = layout.data.is_first and layout.context.is_first

        def is_own(name: str, parameter: Any) -> bool:
            if is_expert(name):  # its replicas are on other ranks than those of the rest of its layer
                return layout.expert_data.is_first
            return is_first and param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)

        return {
            name: parameter.main_grad.detach().float().cpu().clone()  # type: ignore[attr-defined]
            for name, parameter in self.part.trained_parameters()
            if is_own(name, parameter)
        }

    def _accumulate(self, micro_batches: Sequence[MicroBatch], loss: StepLoss, step: int) -> list[MetricAccumulator]:
        """Leaves the step's gradient in each parameter's `main_grad`, reduced and divided; returns the accumulators."""
        part = self.part
        part.train()
        for model in self.models:
            model.train()
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._denominator.zero_()

        def loss_of(index: int, micro_batch: MicroBatch, rows: torch.Tensor) -> tuple[torch.Tensor, MetricAccumulator]:
            total, denominator, accumulator = loss(index, micro_batch, rows, part.head())
            losses.append(total.detach())
            self._denominator += denominator
            return total, accumulator

        losses: list[torch.Tensor] = []
        with part.step():
            accumulators = run_forward_backward(part, self.models, micro_batches, loss_of)
        if losses and not self._train.skip_nonfinite_steps:
            self._require_finite_losses(torch.stack(losses).tolist(), step)
        return accumulators

    def _require_finite_losses(self, losses: Sequence[float], step: int) -> None:
        """Raises on this rank where a micro-batch's loss is not finite; read once, while the passes are running."""
        bad = next((index for index, value in enumerate(losses) if not math.isfinite(value)), None)
        if bad is not None:
            raise NumericsError(
                f"step {step}, rank {self.part.layout.rank}: the loss of micro-batch {bad} is {losses[bad]}. Check the "
                "learning rate, the models' precision, and train.clip_grad."
            )

    def _look_at_attention(self) -> None:
        """Warns once, after a pass, where Transformer Engine has chosen its slow attention."""
        if not self._has_looked:
            self._has_looked = True
            if (warning := slow_attention()) is not None:
                logger.warning(warning)

    def _sync_params(self) -> None:
        """Makes the weights on all ranks those after the last step, and restores the rows beyond V.

        With overlap_param_gather Megatron gathers every rank's share during the next forward pass of training;
        sampling, scoring, evaluation and saving come before it.
        """
        if self._is_stale:
            if self._overlaps_gather:
                for model in self.models:
                    model.start_param_sync(force_sync=True)
            self.spare_rows.restore()
            self._is_stale = False

    def _finalize_gradients(self, model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
        """Runs Megatron's reductions without its division, then divides by the whole batch's denominator.

        Megatron's own divisor is an integer on some versions and clamped to at least 1 on others.
        """
        finalize_model_grads(model, None, **kwargs)
        layout = self.part.layout
        denominator = broadcast_from_last_stage(self._denominator.clone(), layout)
        denominator = sum_over_group(sum_over_group(denominator, layout.data.group), layout.context.group)
        if denominator > 0:
            for chunk in model:
                chunk.scale_gradients(1.0 / float(denominator))

    def _bad_gradient(self) -> tuple[bool, str | None]:
        """Whether any rank has a gradient that is not finite, and the first such parameter of this rank."""
        buffers = [buffer for model in self.models for buffer in (*model.buffers, *model.expert_parallel_buffers)]
        finite = all(bool(torch.isfinite(buffer.grad_data.sum())) for buffer in buffers)
        bad = torch.zeros((), device=self.part.layout.device)
        name = None
        if not finite:
            named = self.part.trained_parameters()
            name = next((n for n, p in named if not bool(torch.isfinite(p.main_grad).all())), None)  # type: ignore
            bad += name is not None
        dist.all_reduce(bad)
        return bool(bad > 0), name

    def _require_finite(self, bad: tuple[bool, str | None], step: int) -> None:
        """Raises on every rank where any has a gradient that is not finite; names the first such parameter."""
        somewhere, name = bad
        if name is not None:
            raise NumericsError(
                f"step {step}, rank {self.part.layout.rank}: the gradient of {name} holds NaN or infinity. "
                "The weights were not changed. Check the learning rate and the data of this step."
            )
        if somewhere:
            raise NumericsError(
                f"step {step}, rank {self.part.layout.rank}: stopped, another rank's gradient is not finite.",
                scope=Scope.FOLLOWS,
            )


def _optimizer_config(train: TrainConfig, parallel: ParallelConfig, model: TransformerConfig) -> OptimizerConfig:
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
        params_dtype=model.params_dtype,
        fp8_recipe=model.fp8_recipe if model.fp8_param else None,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
