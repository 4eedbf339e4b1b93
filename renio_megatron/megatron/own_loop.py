"""Distillation loss for custom Megatron training loops: `forward_step` and `loss_func` for Megatron's schedules.

The model is a GPTModel that returns logits. The weights of the whole batch are needed before the training passes:
`weigh` computes them from log-probabilities, which it finds in forward-only passes where they are not given. Then the
loss of each micro-batch is a sum over its tokens with known factors, and gradients are those of the whole batch
whatever the number of micro-batches and ranks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from renio_megatron.config import LossConfig, WeightingConfig
from renio_megatron.errors import ConfigError, LayoutError
from renio_megatron.losses import kernels
from renio_megatron.losses.argument_checks import check_tokens
from renio_megatron.losses.distillation import mean_denominator, weighted_divergence
from renio_megatron.losses.sample_weights import SampleWeights, sample_weights
from renio_megatron.losses.vocab_passes import VocabParallelPasses
from renio_megatron.objective.reduce import token_scale
from renio_megatron.objective.weightings import LOGIT_INPUTS
from renio_megatron.parallel.vocab import VocabShard

_LOSS, _WEIGHTING = LossConfig(), WeightingConfig()


@dataclass(frozen=True)
class TeacherHidden:
    """A teacher's hidden states, from which logits are computed with the loss.

    Attributes:
        states: final hidden states at the micro-batch's completion positions, as input of its LM head [N, H].
        head: this rank's rows of its LM head, sharded like the student's [L, H].
    """

    states: torch.Tensor
    head: torch.Tensor


@dataclass(frozen=True, eq=False)
class LoopBatch:
    """A micro-batch in the format of Megatron's scripts, with the teacher's output. A row is a sequence.

    Attributes:
        tokens, position_ids: the model's inputs on this context rank [b, s].
        labels: the next token of each position [b, s].
        loss_mask: where `labels` is a token of the completion, [b, s]; any nonzero value counts.
        teacher: the teacher's logits at all positions [b, s, L] or at the completion positions in row-major order [N,
            L], this rank's columns; or `TeacherHidden` of these positions. Only read on the last pipeline stage.
        attention_mask: passed to the model; None: the model's causal mask.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    teacher: torch.Tensor | TeacherHidden | None = None
    attention_mask: torch.Tensor | None = None

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """Completion positions in row-major order over [b, s], int64 [N]; synchronizes with the device once."""
        return self.loss_mask.flatten().nonzero()[:, 0]

    @property
    def owner(self) -> torch.Tensor:
        """The row of each completion token, int64 [N]."""
        return self.places // self.tokens.shape[1]

    @property
    def token_ids(self) -> torch.Tensor:
        """The completion tokens, int64 [N]."""
        return self.labels.flatten()[self.places]


@dataclass(frozen=True)
class StepWeights:
    """Weights of the tokens of a step.

    Attributes:
        sample: weights of this rank's sequences, in the order of the batches; None except on the last pipeline stage.
        scales: for each batch the factor of each completion token's divergence [N]; empty on other stages.
        num_batches: micro-batches of this rank, all of which one call of the schedule takes.
        num_positions: positions of all micro-batches of all data-parallel and context ranks; None on other stages.
        drawn: batches that the schedule has consumed.
    """

    sample: SampleWeights | None
    scales: dict[LoopBatch, torch.Tensor]
    num_batches: int
    num_positions: int | None = None
    drawn: set[LoopBatch] = field(default_factory=set)

    @property
    def state(self) -> torch.Tensor | None:
        """The `state` argument of `weigh` in the next step (`weighting.normalize=ema`)."""
        return None if self.sample is None else self.sample.state


class MegatronDistillation:
    """The distillation loss in a Megatron training loop.

    Groups are those of `megatron.core.parallel_state`. Weights and denominators are those of the whole batch, over the
    data-parallel ranks and all micro-batches; pieces on context ranks are summed. Example: `examples/megatron_loop.py`.
    """

    def __init__(self, vocab_size: int, loss: LossConfig = _LOSS, weighting: WeightingConfig = _WEIGHTING) -> None:
        """`vocab_size` is V, without the columns that pad the vocabulary."""
        self._vocab_size, self._loss, self._weighting = vocab_size, loss, weighting

    def weigh(
        self,
        model: Any,
        batches: Sequence[LoopBatch],
        *,
        weights: torch.Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
        state: torch.Tensor | None = None,
    ) -> StepWeights:
        """Weights of the tokens of this rank's batches. Every rank calls it, with the same optional arguments.

        Inputs of the weighting that follow from logits, log-probabilities included, and are not in `inputs` are
        computed in a forward-only pass of the student over all batches, in evaluation mode.

        Args:
            model: Megatron's module, or the list of them in an interleaved pipeline.
            batches: all micro-batches of the step, of one shape.
            weights: finished weights of this rank's sequences [B], in place of the weighting's.
            inputs: known inputs, by the names of `objective.weightings.strategy.WeightingInputs`: of all completion
                tokens [N] or all sequences [B] of the batches, concatenated row by row.
            state: the `state` of the previous step (`weighting.normalize=ema`).

        Raises:
            ConfigError: a model or a weighting that is not supported here.
            LayoutError: batches or weights of shapes that do not fit together.
        """
        _check_model(model)
        _check_batches(batches)
        num_sequences = sum(len(batch.tokens) for batch in batches)
        self._check_weights(weights, num_sequences)
        values = dict(inputs or {})
        wanted = frozenset() if weights is not None else self._weighting.needs & _OF_PASS - values.keys()
        found = _forward_only(functools.partial(self._scores, wanted), model, batches) if wanted else []
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return StepWeights(None, {}, len(batches))
        values |= {name: torch.cat([one[name] for one in found]) for name in (found[0] if found else {})}
        owner, token_ids = _owners(batches), torch.cat([batch.token_ids for batch in batches])
        vocabulary = VocabShard(0, self._vocab_size, self._vocab_size)
        check_tokens(len(owner), token_ids, owner, num_sequences, vocabulary, None, None)
        unknown = torch.zeros(len(owner), device=owner.device)
        sample = sample_weights(
            values.pop("student_logp", unknown),
            values.pop("teacher_logp", unknown),
            owner,
            num_sequences,
            self._weighting,
            batch_group=parallel_state.get_data_parallel_group(with_context_parallel=False),
            sequence_group=_context_group(),
            weights=weights,
            state=state,
            inputs=values,
        )
        if weights is not None:  # log ratios are unknown
            sample = replace(sample, renio=None)
        scale = token_scale(sample.weights, sample.denominators, owner, sample.token_weights, denominator=1.0)
        parts = scale.split([len(batch.places) for batch in batches])
        positions = torch.tensor(sum(batch.tokens.numel() for batch in batches), device=owner.device)
        dist.all_reduce(positions, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return StepWeights(sample, dict(zip(batches, parts, strict=True)), len(batches), int(positions))

    def forward_step(self, step: StepWeights) -> Callable[..., tuple[torch.Tensor, Callable[..., Any]]]:
        """Megatron's `forward_step_func` for the step with these weights; its iterator must yield the same batches."""

        def forward_step(iterator: Iterator[LoopBatch], model: Any, *_: Any) -> tuple[torch.Tensor, Any]:
            batch = next(iterator)
            if step.sample is not None and batch not in step.scales:
                raise LayoutError(
                    "forward_step was given a batch that `weigh` did not see: the iterator must give the same "
                    "LoopBatch objects."
                )
            return _logits(model, batch), functools.partial(self._loss_of, step, batch, get_model_config(model))

        return forward_step

    def _check_weights(self, weights: torch.Tensor | None, num_sequences: int) -> None:
        if weights is None:
            return
        if self._weighting.weighs_tokens:
            raise ConfigError(
                f"weights are given, of sequences, and weighting={self._weighting.name} weighs tokens. Leave one of "
                "the two out."
            )
        if weights.shape != (num_sequences,):
            raise LayoutError(
                f"weights have the shape {tuple(weights.shape)}, and this rank's batches hold {num_sequences} "
                "sequences: one number for each, in the order of the batches."
            )

    def _loss_of(self, step: StepWeights, batch: LoopBatch, config: Any, output: torch.Tensor) -> tuple[Any, ...]:
        """Megatron's `loss_func`: the loss as Megatron expects it, and its sum and number of sequences as a metric.

        Under `calculate_per_token_loss` Megatron divides the sums of all ranks by a count of all ranks, and has scaled
        its own router losses for a count of all positions: so this count is used here. Otherwise it divides by the
        number of micro-batches, and DDP by the number of ranks.
        """
        assert step.sample is not None and step.num_positions is not None
        if batch in step.drawn:
            raise LayoutError("forward_step was given a batch twice: each is one micro-batch of the step.")
        step.drawn.add(batch)
        student, teacher = self._rows(output, batch)
        shard = self._shard(output)
        found = weighted_divergence(student, teacher, batch.token_ids, step.scales[batch], self._loss, shard)
        size = len(batch.tokens) if parallel_state.get_context_parallel_rank() == 0 else 0
        metrics = {"loss": torch.stack((found.detach().double(), found.new_tensor(size, dtype=torch.float64)))}
        if config.calculate_per_token_loss:
            factor = step.num_positions / step.sample.batch_size.clamp(min=1.0)
            count = torch.tensor(batch.tokens.numel(), dtype=torch.int, device=output.device)
            return found * factor.to(found), count, metrics
        mean = mean_denominator(
            step.sample.batch_size, parallel_state.get_data_parallel_group(with_context_parallel=False)
        )
        return found * (step.num_batches / mean).to(found), metrics

    def _scores(self, wanted: frozenset[str], batch: LoopBatch, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """The wanted inputs from logits at the completion tokens, [N] each."""
        student, teacher = self._rows(output, batch)
        passes = VocabParallelPasses(self._loss, self._shard(output))
        normalizers = passes.normalizers(student, teacher, batch.token_ids)
        logp = {"student_logp": normalizers.student_logp, "teacher_logp": normalizers.teacher_logp}
        found = passes.inputs(wanted, student, teacher, normalizers)
        return found | {name: values for name, values in logp.items() if name in wanted}

    def _shard(self, output: torch.Tensor) -> VocabShard:
        group = parallel_state.get_tensor_model_parallel_group()
        return VocabShard.for_vocab(self._vocab_size, group, width=output.shape[-1])

    def _rows(self, output: torch.Tensor, batch: LoopBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Both models' logits at the completion positions, [N, L] each."""
        if output.shape[:2] != batch.tokens.shape:
            raise LayoutError(
                f"the model's output is {tuple(output.shape)}, and the batch {tuple(batch.tokens.shape)}: logits are "
                "[sequences, positions, columns]. Call no labels, and leave the output as GPTModel has it."
            )
        student, teacher = output.flatten(0, 1)[batch.places], batch.teacher
        if student.dtype == torch.float16:  # whose per-token gradients would underflow to 0
            student = student.float()
        if isinstance(teacher, TeacherHidden):
            dtype = torch.promote_types(teacher.states.dtype, torch.float32)
            out = student.new_empty(len(teacher.states), len(teacher.head), dtype=dtype)
            teacher = kernels.project_rows(teacher.states.detach(), teacher.head.detach(), out)
        elif teacher is not None and teacher.dim() == 3 and teacher.shape[:2] == batch.tokens.shape:
            teacher = teacher.flatten(0, 1)[batch.places]
        if teacher is None or teacher.shape != student.shape:
            shape = None if teacher is None else tuple(teacher.shape)
            raise LayoutError(
                f"the teacher's logits of a batch are {shape}; the student's at its completion positions are "
                f"{tuple(student.shape)}, of {tuple(output.shape)}. Give LoopBatch(teacher=...), cut at the student's "
                "vocabulary edges."
            )
        return student, teacher.detach()


_OF_PASS = LOGIT_INPUTS | {"student_logp", "teacher_logp"}
"""Inputs of a weighting that follow from a student pass together with the teacher's output."""


def _logits(model: Any, batch: LoopBatch) -> torch.Tensor:
    return model(batch.tokens, batch.position_ids, batch.attention_mask)


def _forward_only(
    score: Callable[[LoopBatch, torch.Tensor], Any], model: Any, batches: Sequence[LoopBatch]
) -> list[Any]:
    """Results of `score` on the logits of each batch, on the last stage."""

    def collect(batch: LoopBatch, output: torch.Tensor, non_loss_data: bool = True) -> Any:
        return score(batch, output)

    def forward_step(iterator: Iterator[LoopBatch], chunk: Any, *_: Any) -> tuple[torch.Tensor, Any]:
        batch = next(iterator)
        return _logits(chunk, batch), functools.partial(collect, batch)

    num_chunks = len(model) if isinstance(model, list) and len(model) > 1 else None
    schedule = get_forward_backward_func(parallel_state.get_pipeline_model_parallel_world_size(), num_chunks)
    with torch.no_grad(), _evaluating(model):
        return schedule(
            forward_step_func=forward_step,
            data_iterator=iter(batches) if num_chunks is None else [iter(batches) for _ in model],
            model=model,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1] * parallel_state.get_context_parallel_world_size(),
            micro_batch_size=len(batches[0].tokens),
            forward_only=True,
            collect_non_loss_data=True,
        )


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Context in evaluation mode, without dropout and CUDA-graph recording; restores each module's mode afterwards."""
    training = [one for chunk in _chunks(model) for one in chunk.modules() if one.training]
    for chunk in _chunks(model):
        chunk.eval()
    try:
        yield
    finally:
        for one in training:
            one.training = True


def _chunks(model: Any) -> list[Any]:
    return model if isinstance(model, list) else [model]


def _owners(batches: Sequence[LoopBatch]) -> torch.Tensor:
    """The sequence of each completion token of all batches, int64 [N]."""
    first, found = 0, []
    for batch in batches:
        found.append(batch.owner + first)
        first += len(batch.tokens)
    return torch.cat(found)


def _context_group() -> Any:
    size = parallel_state.get_context_parallel_world_size()
    return parallel_state.get_context_parallel_group() if size > 1 else None


def _check_model(model: Any) -> None:
    """Raises `ConfigError` for a model whose output the loss cannot read."""
    for chunk in _chunks(model):
        config, inner = get_model_config(chunk), chunk
        while hasattr(inner, "module"):
            inner = inner.module
        if getattr(config, "mtp_num_layers", None):
            raise ConfigError(
                f"mtp_num_layers={config.mtp_num_layers}: such a model adds a loss of its own, of all positions. Build "
                "it without."
            )
        if getattr(config, "overlap_moe_expert_parallel_comm", False):
            raise ConfigError(
                "overlap_moe_expert_parallel_comm wants a plan in the place of a pass, which this forward_step does "
                "not make. Switch it off."
            )
        tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
        if tensor_ranks > 1 and not getattr(inner, "parallel_output", True):
            raise ConfigError(
                "the model gathers its logits (parallel_output=False), and the loss wants them as they are cut. Build "
                "it with parallel_output=True."
            )


def _check_batches(batches: Sequence[LoopBatch]) -> None:
    """Raises `LayoutError` for batches that are not micro-batches of one step."""
    if not batches:
        raise LayoutError("a step has at least one micro-batch; got none.")
    if len(set(batches)) < len(batches):
        raise LayoutError("a batch is in the step twice: each is one micro-batch.")
    for batch in batches:
        for name in ("position_ids", "labels", "loss_mask"):
            if getattr(batch, name).shape != batch.tokens.shape:
                raise LayoutError(
                    f"LoopBatch.{name} is {tuple(getattr(batch, name).shape)}, and tokens are "
                    f"{tuple(batch.tokens.shape)}: both are [sequences, positions]."
                )
        if batch.tokens.shape != batches[0].tokens.shape:
            raise LayoutError(
                f"micro-batches of one step have one shape; got {tuple(batches[0].tokens.shape)} and "
                f"{tuple(batch.tokens.shape)}. Pad the rows, with loss_mask 0 there."
            )
