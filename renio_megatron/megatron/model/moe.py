"""Mixture of experts: Megatron's settings, routers that add the load-balancing loss, and their metrics.

Megatron's own auxiliary losses are off. They are averages over a micro-batch, padding included, and where losses are
sums they are multiplied by its number of tokens, for a division by the number of tokens that does not happen here. The
loss here is a sum over sequences, divided by the step's denominator: no split of the batch can change it.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from renio_megatron.config import ParallelConfig, PrecisionConfig
from renio_megatron.errors import ConfigError
from renio_megatron.megatron.model.passes import Passes
from renio_megatron.megatron.runtime.mcore_compat import define_missing_gemm
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.param_map import is_expert
from renio_megatron.objective.load_balance import load_balancing_loss, sum_by_sequence
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.reductions import sum_over_group
from renio_megatron.types import MicroBatch

_EXPERT = re.compile(r"(.*\.mlp\.experts\.local_experts\.)(\d+)(\..+)")


def moe_settings(architecture: Architecture, parallel: ParallelConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig that follow from a model's experts; none for a dense model."""
    experts = architecture.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        # The softmax over the chosen experts alone is the normalized one over all of them.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_ranks,
    }


def check_moe(architecture: Architecture, precision: PrecisionConfig, backend: str) -> None:
    """Raises `ConfigError` where a model with experts cannot be built of these layers; prepares Megatron for one."""
    if architecture.experts is None:
        return
    if backend != "local" or precision.fp8 is not None:
        setting = f"fp8={precision.fp8}" if precision.fp8 is not None else f"backend={precision.backend}"
        raise ConfigError(
            f"{precision.section}.{setting} with a {architecture.family} model: experts are built of Megatron's own "
            f"layers in the parameters' dtype, and neither of Transformer Engine's nor in FP8. Set "
            f"{precision.section}.backend=local and {precision.section}.fp8=null."
        )
    define_missing_gemm()


def mark_experts(chunk: torch.nn.Module) -> None:
    """Has Megatron reduce every expert's gradient over the ranks that hold a copy of it.

    Megatron marks them itself where different ranks have different experts, but not where tensor-parallel ranks have
    copies of all of them: their gradients would lack the other ranks' tokens. The mark also gives the experts a
    separate optimizer in all layouts, so that a checkpoint has the same format in all.
    """
    for name, parameter in chunk.named_parameters():
        if is_expert(name):
            parameter.allreduce = False  # type: ignore[attr-defined]


def whole_model_name(name: str, first_expert: int) -> str:
    """A parameter's name with the expert's number in the whole model.

    >>> whole_model_name("decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight", 4)
    'decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight'
    """
    match = _EXPERT.fullmatch(name)
    return f"{match[1]}{int(match[2]) + first_expert}{match[3]}" if match else name


@dataclass(frozen=True)
class _Read:
    """Metadata of the tokens that a router sees.

    Attributes:
        sequence_T: sequence of each token, -1 for padding, in the order of the router's tokens.
        weight_B: contribution of each sequence to the step's denominator.
    """

    sequence_T: torch.Tensor
    weight_B: torch.Tensor


class Routing:
    """The routers of a trained part: the load-balancing loss that they add, and their load in a step.

    The loss of a layer is c x (sum over the step's sequences of w_b x `load_balancing_loss`), divided by the step's
    denominator, which is the sum of the w_b: 1 in distillation, and in fine-tuning, whose denominator counts tokens,
    the sequence's completion tokens. The layers' losses are summed, as in Megatron. All tokens that the model reads
    count, prompts included, and no padding. Only the step's own passes count; scoring and sampling do nothing here.
    """

    def __init__(
        self, architecture: Architecture, layout: ParallelLayout, coefficient: float, *, sequence_parallel: bool
    ) -> None:
        """`coefficient` is c; the tensor ranks have different tokens where `sequence_parallel`."""
        assert architecture.experts is not None
        self._counts_tokens = False
        self._experts, self._layout, self._coefficient = architecture.experts, layout, coefficient
        self._pieces = layout.tensor if sequence_parallel else None
        self._passes: Passes[_Read] = Passes()
        # Of each layer: tokens of each expert; sums of entropy, of weight x loss, and of weights.
        size = (architecture.num_layers, self._experts.num_experts + 3)
        self._sums = torch.zeros(size, dtype=torch.float64, device=layout.device)

    def count_tokens(self) -> None:
        """Makes the step's denominator count completion tokens instead of sequences."""
        self._counts_tokens = True

    def begin_step(self) -> None:
        """Clears the state of an earlier step."""
        self._sums.zero_()
        self._passes.clear()

    def end_step(self) -> None:
        """Stops the recording of routers until the next step."""
        self._passes.clear()

    def begin(self, micro_batch: MicroBatch) -> None:
        """Sets the micro-batch that the next forward pass of this part reads."""
        sequence_of = micro_batch.sequence_of.transpose(0, 1)
        if self._pieces is not None:
            sequence_of = sequence_of.chunk(self._pieces.size)[self._pieces.rank]
        lengths = micro_batch.lengths.float()
        weights = lengths if self._counts_tokens else torch.ones_like(lengths)
        self._passes.begin(_Read(sequence_of.flatten(), weights))

    def observe(self, layer: int, logits: torch.Tensor, probs: torch.Tensor, is_chosen: torch.Tensor) -> torch.Tensor:
        """`probs`, whose backward pass adds the gradient of the load-balancing loss to that of the logits.

        Args:
            layer: index in the whole model, from 0.
            logits: the router's logits, [s, b, E].
            probs: probabilities of the chosen experts, as the model uses them, [s x b, E].
            is_chosen: bool [s x b, E].
        """
        read, is_recomputed = self._passes.read(layer)
        if read is None or is_recomputed:
            return probs
        count = len(read.weight_B)
        scores = logits.flatten(0, 1).float().softmax(-1)
        own_counts = sum_by_sequence(is_chosen.float(), read.sequence_T, count)
        counts = own_counts if self._pieces is None else sum_over_group(own_counts, self._pieces.group)
        counts = sum_over_group(counts, self._layout.context.group)
        losses = load_balancing_loss(sum_by_sequence(scores, read.sequence_T, count), counts, self._experts.top_k)
        total = (losses * read.weight_B).sum()
        self._count(layer, own_counts, scores.detach()[read.sequence_T >= 0], total.detach(), read.weight_B)
        if self._coefficient == 0:
            return probs
        return _AddLoss.apply(probs, self._coefficient * total)

    def metrics(self) -> dict[str, float]:
        """Metrics of the routers of all ranks in the last step; every rank calls this."""
        sums = self._sums.clone()
        dist.all_reduce(sums)
        load, (entropy, loss, weight) = sums[:, :-3], sums[:, -3:].sum(0)
        mean_load = load.mean(-1)
        return {
            "moe/aux_loss": float(loss / weight),
            "moe/load_max_over_mean": float((load.amax(-1) / mean_load).max()),
            "moe/idle_frac": float((load == 0).double().mean()),
            "moe/router_entropy": float(entropy / load.sum() * self._experts.top_k),
        }

    def _count(
        self, layer: int, counts: torch.Tensor, scores: torch.Tensor, loss: torch.Tensor, weights: torch.Tensor
    ) -> None:
        layout = self._layout
        is_first_piece = (self._pieces is None or self._pieces.is_first) and layout.context.is_first
        entropy = torch.special.entr(scores).sum()
        row = torch.stack((entropy, loss, weights.sum() * is_first_piece))
        self._sums[layer] += torch.cat((counts.sum(0), row)).double()


def watch_routers(chunk: torch.nn.Module, routing: Routing) -> None:
    """Makes every router of a chunk report to `routing` in training."""
    for router in [module for module in chunk.modules() if isinstance(module, TopKRouter)]:
        router_class: Any = type(router)
        router.__class__ = _watched(router_class)
        router.renio_routing = routing


@functools.cache
def _watched(router_class: Any) -> Any:
    """A subclass of a router's class of any Megatron version.

    Not a mix-in as elsewhere: routers are abstract classes, whose instances cannot be given other bases in Python.
    """

    def routing(self: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        probs, is_chosen = router_class.routing(self, logits, *args, **kwargs)
        if self.training:
            probs = self.renio_routing.observe(self.layer_number - 1, logits, probs, is_chosen)
        return probs, is_chosen

    return type(f"Watched{router_class.__name__}", (router_class,), {"routing": routing})


class _AddLoss(torch.autograd.Function):
    """Passes a tensor through, and in backward starts that of a loss that is not part of the output.

    The step's gradient is that of a sum of losses with factor 1 (there is no fp16, so nothing scales it), which this
    loss joins.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss)
