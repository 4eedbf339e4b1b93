"""Students and teachers with experts: tiny models, one step through the trainer in every layout, and its mutants."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.config import DataConfig, ParallelConfig, TeacherConfig, TrainConfig
from renio_megatron.data.sources.modchain import build_tokenizer
from tests.helpers.moe_reference import gradient_errors, reference_step
from tests.helpers.training_cases import VOCAB_SIZE, recipe, save_models

COEFFICIENT = 0.3
"""Of the load-balancing loss: large enough that its gradient is a good part of every router's."""

_QWEN = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen": ("Qwen3Moe", {**_QWEN, "norm_topk_prob": True}),
    "qwen, not normalised": ("Qwen3Moe", {**_QWEN, "norm_topk_prob": False, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@dataclass(frozen=True)
class Case:
    """A layout, the trainer's settings, student and teacher."""

    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    model: str = "qwen"
    teacher: str = "teacher"


MICRO_1, MICRO_4, PACKED = {"micro_batch_size": 1}, {"micro_batch_size": 4}, {"max_tokens_per_micro_batch": 40}
CASES = {  # neighbours share a layout, whose groups are made once
    "DP2": Case(),
    "DP2, micro-batch 1": Case(train=MICRO_1),
    "DP2, micro-batch 4": Case(train=MICRO_4),
    "DP2, packed": Case(train=PACKED),
    "DP2, no coefficient": Case(train={"moe_aux_loss_coeff": 0.0}),
    "DP2, mixtral": Case(model="mixtral"),
    "DP2, distributed optimiser, overlap": Case(OVERLAP),
    "EP2": Case(EP2),
    "EP2, micro-batch 1": Case(EP2, MICRO_1),
    "EP2, micro-batch 4": Case(EP2, MICRO_4),
    "EP2, recompute full": Case(EP2, {**FULL, **MICRO_1}),
    "EP2, not normalised, tied": Case(EP2, model="qwen, not normalised"),
    "EP2, mixtral": Case(EP2, model="mixtral"),
    "EP2, distributed optimiser, overlap": Case({**EP2, **OVERLAP}),
    "EP2, bf16": Case(EP2, {"bf16": True}),
    "EP2, dense student": Case(EP2, model="student", teacher="qwen"),
    "EP2, both with experts": Case(EP2, teacher="mixtral"),
    "expert TP2 on data ranks": Case({"expert_tensor_parallel_size": 2}),
    "TP2 + SP": Case(TP2_SP),
    "TP2 + SP, micro-batch 1": Case(TP2_SP, MICRO_1),
    "TP2 + SP, packed": Case(TP2_SP, PACKED),
    "TP2 + SP, mixtral": Case(TP2_SP, model="mixtral"),
    "TP2, dense student": Case({"tensor_model_parallel_size": 2}, model="student", teacher="mixtral"),
    "TP2 + SP, whole experts": Case({**TP2_SP, "expert_tensor_parallel_size": 1}),
    "TP2 + SP, EP2": Case({**TP2_SP, **EP2, "expert_tensor_parallel_size": 1}),
    "TP2 + SP, EP2, packed": Case({**TP2_SP, **EP2, "expert_tensor_parallel_size": 1}, PACKED),
    "PP2": Case(PP2, MICRO_1),
    "PP2, recompute full": Case(PP2, {**MICRO_1, **FULL}),
    "PP2, packed, recompute full": Case(PP2, {**PACKED, **FULL}),
    "PP2 x VPP2, recompute full": Case(VPP2, {**MICRO_1, **FULL}),
    "CP2": Case(CP2),
    "CP2, EP2": Case({**CP2, **EP2}),
}
CASES_ON_4 = {
    "TP2 + SP x EP2": Case({**TP2_SP, **EP2}),
    "PP2 x EP2, recompute full": Case({**PP2, **EP2}, {**MICRO_1, **FULL}),
}


def save_mixtures(folder: Path) -> None:
    """`MIXTURES` and the dense models of `training_cases`, of one vocabulary, with random weights."""
    import transformers

    save_models(folder)
    for seed, (name, (kind, more)) in enumerate(MIXTURES.items()):
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            **more,
        )
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        for parameter_name, parameter in model.named_parameters():  # routers that prefer some experts
            scale = 0.4 if "gate.weight" in parameter_name else 0.1
            parameter.data += scale * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        build_tokenizer(folder / name)


def config_of(case: Case, folder: Path) -> Any:
    """The recipe of a case."""
    train = {"train_iters": 1, "global_batch_size": 8, "micro_batch_size": 2, "lr": 1e-3, "seed": 7}
    if "max_tokens_per_micro_batch" in case.train:
        train.pop("micro_batch_size")
    is_mixture = case.model in MIXTURES
    return recipe(
        folder,
        model=str(folder / case.model),
        parallel=ParallelConfig(**case.parallel),
        data=DataConfig(seed=5, max_prompt_length=20),
        train=TrainConfig(**{**train, "moe_aux_loss_coeff": COEFFICIENT if is_mixture else 0.0, **case.train}),
        teacher=TeacherConfig(model=str(folder / case.teacher)),
    )


@contextlib.contextmanager
def replaced(name: str, value: Callable[[Any], Any]) -> Iterator[None]:
    """Something of `megatron/model/moe.py`, `Class.attribute` or a function, is what `value` makes of it."""
    from renio_megatron.megatron.model import build, moe, transformer_config

    owner, _, last = name.rpartition(".")
    holders: list[Any] = (
        [getattr(moe, owner)]
        if owner
        else [module for module in (moe, build, transformer_config) if hasattr(module, last)]
    )
    before = getattr(holders[0], last)
    for holder in holders:
        setattr(holder, last, value(before))
    try:
        yield
    finally:
        for holder in holders:
            setattr(holder, last, before)


def _forgets_recomputation(observe: Any) -> Any:
    return lambda self, layer, logits, probs, chosen: (
        observe(self, layer, logits, probs, chosen) if torch.is_grad_enabled() else probs
    )


class _NoLoss:
    apply = staticmethod(lambda output, loss: output)


def _mark_as_all_others(chunk: torch.nn.Module) -> None:
    """Experts as parameters that every tensor rank computes alike, which with whole experts they are not."""
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = True


def _times_tokens(real: Any) -> Any:
    """Megatron's way: the gradient of the loss is multiplied by the number of tokens."""

    class OfSums:
        apply = staticmethod(lambda output, loss: real.apply(output, loss * len(output)))

    return OfSums


MUTANTS: dict[str, tuple[str, str, Callable[[Any], Any], str]] = {
    # name: (case, what is replaced, by what, the figure that must show it)
    "no loss": ("DP2", "_AddLoss", lambda real: _NoLoss, "router"),
    "loss times tokens": ("DP2", "_AddLoss", _times_tokens, "router"),
    "padding counts": ("DP2", "sum_by_sequence", lambda real: lambda v, of, n: real(v, of.clamp(min=0), n), "router"),
    "the same in the metrics": (
        "DP2",
        "sum_by_sequence",
        lambda real: lambda v, of, n: real(v, of.clamp(min=0), n),
        "moe/aux_loss",
    ),
    "counts of a piece, SP": ("TP2 + SP", "sum_over_group", lambda real: lambda values, group: values, "router"),
    "counts of a piece, CP": ("CP2", "sum_over_group", lambda real: lambda values, group: values, "router"),
    "whole rows, SP": ("TP2 + SP", "Routing.begin", lambda real: _whole_rows(real), "router"),
    "recomputed with another batch": ("PP2, recompute full", "Routing.observe", _forgets_recomputation, "router"),
    "copies not summed": (
        "TP2 + SP, whole experts",
        "mark_experts",
        lambda real: _mark_as_all_others,
        "experts",
    ),
    "always normalised": (
        "EP2, not normalised, tied",
        "moe_settings",
        lambda real: lambda *args: real(*args) | ({"moe_router_pre_softmax": False} if real(*args) else {}),
        "sampler",
    ),
    "the first rank's experts": (
        "EP2",
        "whole_model_name",
        lambda real: lambda name, first: real(name, 0),
        "sampler",
    ),
}


def _whole_rows(begin: Any) -> Any:
    """The first tensor rank's tokens, on every rank."""

    def mutated(self: Any, micro_batch: Any) -> None:
        pieces, self._pieces = self._pieces, replace(self._pieces, rank=0)
        begin(self, micro_batch)
        self._pieces = pieces

    return mutated


_references: dict[Any, Any] = {}
"""Steps of a single process, which most layouts share."""


def run_named(name: str, folder: Path) -> dict[str, float]:
    """`run_case` of one of `CASES` or `CASES_ON_4`."""
    return run_case({**CASES, **CASES_ON_4}[name], folder)


def run_mutant(name: str, folder: Path) -> dict[str, float]:
    """`run_case` of a mutant's case, while it is one."""
    case, what, value, _ = MUTANTS[name]
    with replaced(what, value):
        return run_case(CASES[case], folder)


def run_case(case: Case, folder: Path) -> dict[str, float]:
    """One optimiser step; this rank's errors against the single process, which runs once for equal steps."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs
    from tests.megatron.layout_cases import own_part

    config = config_of(case, folder)
    layout = start(config.parallel, seed=7)
    trainer = build_trainer(config, read_inputs(config), layout, folder / "unused")
    trainer.save_interval = 0
    algorithm, learner = trainer.algorithm, trainer.algorithm.learner
    seen: dict[str, Any] = {}
    weigh, real_step = algorithm.weigh, learner.optimizer.step

    def look_and_step() -> Any:
        seen["gradients"] = {name: own_part(p, learner) for name, p in learner.part.trained_parameters()}
        return real_step()

    def weigh_and_keep(rollouts: Any, *args: Any, **more: Any) -> Any:  # packing may have dealt them out to other ranks
        seen["rollouts"], seen["sample"] = rollouts, weigh(rollouts, *args, **more)
        return seen["sample"]

    algorithm.weigh = weigh_and_keep
    learner.optimizer.step = look_and_step
    metrics = trainer.run()

    shares: list[Any] = [None] * layout.data.size
    mine = [(r.prompt.index, r, w) for r, w in zip(seen["rollouts"], seen["sample"].weights.tolist(), strict=True)]
    dist.all_gather_object(shares, mine, group=layout.data.group)
    batch = sorted(itertools.chain.from_iterable(shares), key=lambda one: one[0])
    rollouts, weights = [one[1] for one in batch], torch.tensor([one[2] for one in batch])
    tokens, coefficient = tuple(r.completion_ids for r in rollouts), config.train.moe_aux_loss_coeff
    key = (config.model, config.teacher.model, config.train.bf16, coefficient, tokens)
    if key not in _references:
        _references[key] = reference_step(config, rollouts, given_weights=weights if config.train.bf16 else None)
    reference = _references[key]
    errors = gradient_errors(seen["gradients"], reference["gradients"], learner.part)
    own_logp = torch.cat([rollout.logp for rollout in rollouts])
    return {
        **errors,
        "loss": _relative(metrics["loss"], reference["loss"]),
        "weight": float((weights - reference["weights"]).abs().max()),
        "unlike_1": float(((reference["weights"] - 1).abs() > 0.05).sum()),
        "sampler": float((own_logp - reference["logp"]).abs().max()),
        "grad_norm": _relative(metrics["grad_norm"], reference["grad_norm"]),
        **{name: _relative(metrics[name], value) for name, value in reference["metrics"].items()},
        "aux_share": reference["aux_share"],
        "idle_experts": reference["idle_experts"],
    }


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-12)
