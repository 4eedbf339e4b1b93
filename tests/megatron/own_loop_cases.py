"""A step in Megatron's own loop next to the trainer's: the same rollouts, teacher and weights of models."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear

from renio_megatron.config import ParallelConfig, WeightingConfig
from renio_megatron.config.sections.combined_weighting import ProductWeighting
from renio_megatron.config.sections.weighting import RenioWeighting, StudentEntropyWeighting
from renio_megatron.megatron import LoopBatch, MegatronDistillation, TeacherHidden
from tests.helpers.training_cases import recipe

RENIO = RenioWeighting(threshold=0.3, ceiling=1.5)
LAYOUTS = {
    2: {
        "TP2 + SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "PP2": {"pipeline_model_parallel_size": 2},
        "PP2 x VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        "CP2": {"context_parallel_size": 2},
        "DP2": {},
    },
    4: {"TP2 x PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}},
}
WEIGHTINGS: dict[str, WeightingConfig] = {
    "renio": RENIO,
    "renio x entropies": ProductWeighting(factors=(RENIO, StudentEntropyWeighting())),
}


@dataclass(frozen=True)
class Variant:
    """How a loop is: Megatron's division, the form of the teacher's answer, and what is known before."""

    per_token: bool
    teacher: str
    known: str = ""
    distributed: bool = False


VARIANTS = (
    Variant(per_token=True, teacher="hidden"),
    Variant(per_token=False, teacher="rows", distributed=True),
    Variant(per_token=False, teacher="all", known="weights"),
    Variant(per_token=True, teacher="all", known="log-probabilities"),
)


def run_cases(world_size: int, folder: Path) -> dict[str, Any]:
    """Name -> errors of this rank against the trainer."""
    found = {}
    for (layout, sizes), (name, weighting) in itertools.product(LAYOUTS[world_size].items(), WEIGHTINGS.items()):
        model = {"model": str(folder / "deep")} if "VPP" in layout else {}
        base = recipe(folder, parallel=ParallelConfig(**sizes), weighting=weighting, **model)
        config = replace(base, train=replace(base.train, micro_batch_size=1 if layout == "DP2" else 2))
        for how in VARIANTS:
            if how.known != "weights" or name == "renio":
                found[f"{layout}, {name}, {how}"] = _errors(config, folder, how)
    return found


def _errors(config: Any, folder: Path, how: Variant) -> dict[str, float]:
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.megatron.weights.pretrained import load_pretrained
    from renio_megatron.runner.inputs import read_inputs

    layout, inputs = start(config.parallel, seed=7), read_inputs(config)
    theirs = _trained(config, inputs, layout, folder)
    part = build_model(
        inputs.architecture,
        layout,
        config.parallel,
        config.train,
        vocab_size=inputs.vocab_size,
        num_rows=inputs.architecture.vocab_size,
        initialize=False,
    )
    load_pretrained(part, inputs.weights)
    if (last := part.chunks[-1]).post_process:  # Megatron's own output layer
        last.output_layer.__class__ = last.output_layer.__class__.__mro__[2]
        assert last.output_layer.__class__ is ColumnParallelLinear
    part.config.calculate_per_token_loss = how.per_token
    part.config.finalize_model_grads_func = finalize_model_grads
    wrapping = DistributedDataParallelConfig(grad_reduce_in_fp32=True, average_in_collective=how.distributed)
    models = [DistributedDataParallel(part.config, wrapping, one, disable_bucketing=True) for one in part.chunks]
    is_interleaved = len(models) > 1
    model = models if is_interleaved else models[0]
    batches = [_batch(*pair, how.teacher) for pair in theirs["batches"]]
    distillation = MegatronDistillation(inputs.vocab_size, config.loss, config.weighting)
    known: dict[str, Any] = {}
    if how.known == "weights":
        known["weights"] = theirs["sample"].weights
    if how.known == "log-probabilities":
        order = torch.cat([one.token_index[torch.argsort(one.row_index)] for one, _ in theirs["batches"]])
        known["inputs"] = {name: values[order] for name, values in theirs["logp"].items()}
    step = distillation.weigh(model, batches, **known)
    losses = get_forward_backward_func(layout.pipeline.size, len(models) if is_interleaved else None)(
        forward_step_func=distillation.forward_step(step),
        data_iterator=[iter(batches) for _ in models] if is_interleaved else iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1] * layout.context.size,
        micro_batch_size=len(batches[0].tokens),
        forward_only=False,
    )
    errors = {"gradient": 0.0, "batches": float(len(batches)), "unlike_1": 0.0}
    for name, parameter in part.named_parameters():
        expected = theirs["gradients"][name]
        error = (parameter.main_grad - expected).norm() / expected.norm().clamp(min=1e-12)
        errors["gradient"] = max(errors["gradient"], float(error))
    if step.sample is not None:
        errors["weight"] = float((step.sample.weights - theirs["sample"].weights).abs().max())
        errors["unlike_1"] = float((step.sample.weights - 1).abs().max())
        total = torch.stack([one["loss"] for one in losses]).sum(0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        errors["loss"] = abs(float(total[0] / total[1]) - theirs["loss"]) / theirs["loss"]
        errors["sequences"] = float(total[1])
    return errors


def _trained(config: Any, inputs: Any, layout: Any, folder: Path) -> dict[str, Any]:
    """What the trainer's step has: micro-batches with the teacher's hidden states, weights, gradients."""
    from renio_megatron.runner.build import build_trainer

    trainer = build_trainer(config, inputs, layout, folder / "unused")
    trainer.save_interval = 0
    algorithm, learner = trainer.algorithm, trainer.algorithm.learner
    seen: dict[str, Any] = {}
    score, weigh, real_step = algorithm.teacher.score, algorithm.weigh, learner.optimizer.step

    def score_and_keep(rollouts: Any, batches: Any) -> Any:
        targets = score(rollouts, batches)
        if layout.pipeline.is_last:
            head = targets.head().weight
            seen["batches"] = [(b, (targets.payload[i], head)) for i, b in enumerate(batches)]
        else:
            seen["batches"] = [(batch, None) for batch in batches]
        return targets

    def weigh_and_keep(rollouts: Any, scores: Any, targets: Any, **more: Any) -> Any:
        seen["sample"] = weigh(rollouts, scores, targets, **more)
        seen["logp"] = {"student_logp": scores["student_logp"], "teacher_logp": targets.logp}
        return seen["sample"]

    def look_and_step() -> Any:
        seen["gradients"] = {name: one.main_grad.clone() for name, one in learner.part.named_parameters()}
        return real_step()

    algorithm.teacher.score, algorithm.weigh, learner.optimizer.step = score_and_keep, weigh_and_keep, look_and_step
    metrics = trainer.run()
    algorithm.close()
    return {**seen, "loss": metrics["loss"]}


def _batch(batch: Any, answer: Any, form: str) -> LoopBatch:
    """A micro-batch of the trainer's as Megatron's scripts have it."""
    labels, mask = torch.zeros_like(batch.token_ids).flatten(), torch.zeros(batch.token_ids.numel())
    labels[batch.row_index], mask[batch.row_index] = batch.target_ids, 1.0
    shape = batch.token_ids.shape
    teacher: Any = None
    if answer is not None:
        states, head = answer
        order = torch.argsort(batch.row_index)
        rows = states[order] @ head.T
        whole = torch.zeros(mask.numel(), rows.shape[1]).index_copy(0, batch.row_index[order], rows)
        forms = {"hidden": TeacherHidden(states[order], head), "rows": rows, "all": whole.view(*shape, -1)}
        teacher = forms[form]
    return LoopBatch(batch.token_ids, batch.position_ids, labels.view(shape), mask.view(shape), teacher=teacher)


class _Fixed:
    """A model whose logits are given."""

    def __init__(self, config: Any, logits: torch.Tensor) -> None:
        self.config, self.logits = config, logits

    def __call__(self, *_: Any) -> torch.Tensor:
        return self.logits


def refusals() -> dict[str, str]:
    """What is said about batches and weights that do not fit, by name."""
    from renio_megatron.errors import RenioError
    from renio_megatron.megatron.runtime.initialize import start

    start(ParallelConfig(), seed=1)
    text = torch.arange(8).view(2, 4)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]])
    logits = torch.randn(2, 4, 17)
    model = _Fixed(SimpleNamespace(calculate_per_token_loss=True), logits)
    distillation, given = MegatronDistillation(17), torch.ones(2)
    entropies = MegatronDistillation(17, weighting=StudentEntropyWeighting())

    def batch(**changes: Any) -> LoopBatch:
        whole = {"tokens": text, "position_ids": text, "labels": text, "loss_mask": mask, "teacher": logits}
        return LoopBatch(**{**whole, **changes})

    def loss_of(one: LoopBatch, *, seen: LoopBatch | None = None, times: int = 1, **how: Any) -> None:
        step = distillation.weigh(model, [seen or one], weights=given)
        for _ in range(times):
            output, loss_func = distillation.forward_step(step)(iter([one]), how.get("model", model))
            loss_func(output)

    attempts = {
        "none": lambda: distillation.weigh(model, []),
        "labels": lambda: distillation.weigh(model, [batch(labels=text[:1])], weights=given),
        "shapes": lambda: distillation.weigh(model, [batch(), _shorter(batch())], weights=torch.ones(4)),
        "given": lambda: distillation.weigh(model, [batch()], weights=torch.ones(3)),
        "no teacher": lambda: loss_of(batch(teacher=None)),
        "narrow teacher": lambda: loss_of(batch(teacher=logits[..., :5])),
        "other rows": lambda: loss_of(batch(teacher=logits[0])),
        "another batch": lambda: loss_of(batch(), seen=batch()),
        "twice in a step": lambda: distillation.weigh(model, [one := batch(), one], weights=torch.ones(4)),
        "drawn twice": lambda: loss_of(batch(), times=2),
        "tokens weigh": lambda: entropies.weigh(model, [batch()], weights=given),
        "labels beyond": lambda: distillation.weigh(model, [batch(labels=text + 20)], weights=given),
        "a plan": lambda: distillation.weigh(_with(overlap_moe_expert_parallel_comm=True), [batch()], weights=given),
        "more predictions": lambda: distillation.weigh(_with(mtp_num_layers=1), [batch()], weights=given),
        "sequence first": lambda: loss_of(batch(), model=_Fixed(model.config, logits.transpose(0, 1))),
        "teacher sequence first": lambda: loss_of(batch(teacher=logits.transpose(0, 1))),
        "right": lambda: loss_of(batch()),
        "rows": lambda: loss_of(batch(teacher=logits.flatten(0, 1)[mask.flatten() > 0])),
        "hidden": lambda: loss_of(batch(teacher=TeacherHidden(torch.randn(3, 5), torch.randn(17, 5)))),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = ""
        except RenioError as error:
            said[name] = str(error)
    return said


def _with(**settings: Any) -> _Fixed:
    return _Fixed(SimpleNamespace(**settings), torch.empty(0))


def _shorter(batch: LoopBatch) -> LoopBatch:
    return LoopBatch(*(getattr(batch, name)[:, :3] for name in ("tokens", "position_ids", "labels", "loss_mask")))


def routers() -> dict[str, list[torch.Tensor]]:
    """Gradients of a model with experts whose routers have a loss of their own, under both of Megatron's divisions."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.megatron.runtime.mcore_compat import define_missing_gemm

    layout, found = start(ParallelConfig(), seed=1), {}
    define_missing_gemm()
    generator = torch.Generator().manual_seed(layout.data.rank)
    text = torch.randint(0, 17, (2, 2, 9), generator=generator)
    places, mask = torch.arange(8).expand(2, 8), torch.arange(8).expand(2, 8) > 3
    teachers = torch.randn(2, 2, 8, 32, generator=generator)
    batches = [
        LoopBatch(one[:, :-1], places, one[:, 1:], mask, teacher=logits)
        for one, logits in zip(text, teachers, strict=True)
    ]
    for coefficient, per_token in itertools.product((0.0, 5.0), (False, True)):
        torch.manual_seed(3)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=16,
            num_attention_heads=2,
            num_moe_experts=4,
            moe_router_topk=2,
            moe_aux_loss_coeff=coefficient,
            moe_token_dispatcher_type="alltoall",
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            calculate_per_token_loss=per_token,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            finalize_model_grads_func=finalize_model_grads,
        )
        spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False)
        chunk = GPTModel(config, spec, vocab_size=32, max_sequence_length=8, position_embedding_type="rope")
        model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk)
        distillation = MegatronDistillation(17, weighting=WeightingConfig(name="uniform"))
        step = distillation.weigh(model, batches)
        get_forward_backward_func()(
            forward_step_func=distillation.forward_step(step),
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=2,
            seq_length=8,
            micro_batch_size=2,
            forward_only=False,
        )
        found[f"{coefficient}, {per_token}"] = [one.main_grad.clone() for one in chunk.parameters()]
    return found
