"""Steps of a student with adapters through the trainer, in layouts of two and four ranks, and the same steps by PEFT.

The reference shares nothing with the code under test but the sampled tokens: PEFT's model on transformers', the
objective of `objective/reference.py`, torch's AdamW. Which axis of an adapter is cut is written out here.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.config import DataConfig, LoraConfig, ParallelConfig, TrainConfig
from renio_megatron.config.sections.weighting import UniformWeighting
from tests.helpers.masks_by_hand import DropoutByHand
from tests.helpers.training_cases import recipe, reference_step
from tests.megatron.layout_cases import own_part, small_buckets

WHERE = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
CUT_AXES = {  # of A [r, in] and B [out, r]; None: every tensor rank has all of it
    **{name: {"a": None, "b": 0} for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")},
    **{name: {"a": 1, "b": None} for name in ("o_proj", "down_proj")},
}
_NAME = re.compile(r"decoder\.layers\.(\d+)\..+\.adapters\.(\w+_proj)_([ab])")

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
TP2, TP2_SP = {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
ALL, SOME = (
    LoraConfig(r=3, alpha=6.0),
    LoraConfig(r=2, alpha=3.0, use_rslora=True, targets=["v_proj", "q_proj", "up_proj"]),
)
DROPPED, SOME_DROPPED = replace(ALL, dropout=0.2), replace(SOME, dropout=0.2)


@dataclass(frozen=True)
class Case:
    """A layout, the trainer's settings, adapters, and whether the model is tied."""

    parallel: dict[str, Any]
    train: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig = ALL
    tied: bool = False


CASES = {
    "TP1 (DP2)": Case({}),
    "TP1 (DP2), tied, recompute full": Case({}, FULL, tied=True),
    "TP2": Case(TP2),
    "TP2, tied, recompute full": Case(TP2, FULL, tied=True),
    "TP2, some targets": Case(TP2, lora=SOME),
    "TP2 + SP": Case(TP2_SP),
    "TP2 + SP, tied, recompute full": Case(TP2_SP, FULL, tied=True),
    "TP2 + SP, some targets, recompute selective": Case(TP2_SP, {"recompute_granularity": "selective"}, SOME),
    "TP2 + SP, packed": Case(TP2_SP, {"max_tokens_per_micro_batch": 32}),
    "PP2": Case(PP2),
    "PP2, tied, recompute full": Case(PP2, FULL, tied=True),
    "PP2 x VPP2": Case({**PP2, "virtual_pipeline_model_parallel_size": 2}, FULL),
    "CP2": Case({"context_parallel_size": 2}),
    "DP2, distributed optimiser, overlap": Case(OVERLAP),
    "TP2 + SP, recompute full, bf16": Case(TP2_SP, {"bf16": True, **FULL}),
    "DP2, dropout": Case({}, lora=DROPPED),
    "TP2, dropout, some targets, recompute full": Case(TP2, FULL, SOME_DROPPED),
    "TP2 + SP, dropout, recompute full": Case(TP2_SP, FULL, DROPPED),
    "TP2 + SP, dropout, packed": Case(TP2_SP, {"max_tokens_per_micro_batch": 32}, DROPPED),
    "PP2, dropout, recompute full": Case(PP2, {**FULL, "micro_batch_size": 1}, DROPPED),
    "PP2 x VPP2, dropout, recompute full": Case(
        {**PP2, "virtual_pipeline_model_parallel_size": 2}, {**FULL, "micro_batch_size": 1}, DROPPED
    ),
    "PP2, dropout, recompute selective": Case(PP2, {"recompute_granularity": "selective"}, DROPPED),
    "CP2, dropout": Case({"context_parallel_size": 2}, lora=DROPPED),
}
FOUR_RANKS = {
    "TP2 x PP2 + SP": Case({**TP2_SP, **PP2}),
    "TP2 x PP2 + SP, tied, recompute full": Case({**TP2_SP, **PP2}, FULL, tied=True),
    "DP2 x TP2, distributed optimiser, overlap": Case({**TP2, **OVERLAP}),
    "DP2 x TP2 + SP, distributed optimiser, packed": Case(
        {**TP2_SP, "use_distributed_optimizer": True}, {"max_tokens_per_micro_batch": 32}, SOME
    ),
    "DP2 x PP2, distributed optimiser": Case({**PP2, "use_distributed_optimizer": True}),
    "CP2 x TP2 + SP": Case({**TP2_SP, "context_parallel_size": 2}, tied=True),
    "CP2 x TP2 + SP, dropout, packed": Case(
        {**TP2_SP, "context_parallel_size": 2}, {"max_tokens_per_micro_batch": 32}, DROPPED
    ),
}


def hf_name(name: str) -> tuple[str, str, str]:
    """PEFT's module, the target and `a` or `b` of one of our parameters."""
    match = _NAME.fullmatch(name)
    assert match, name
    layer, target, which = match.groups()
    return f"model.layers.{layer}.{WHERE[target]}.{target}", target, which


def cut(whole: torch.Tensor, target: str, which: str, part: Any) -> torch.Tensor:
    """This rank's part of a whole A or B."""
    axis, tensor = CUT_AXES[target][which], part.layout.tensor
    return whole if axis is None else whole.chunk(tensor.size, axis)[tensor.rank]


def peft_student(
    directory: str, lora: LoraConfig, *, bf16: bool = False, dropped: dict[str, Any] | None = None, seed: int = 7
) -> Any:
    """PEFT's model of a directory, fp32; random B of one seed, and A too. With `bf16` all weights are rounded to it.

    With `dropped` inputs of adapters are dropped, by the masks of the prompt with its `number`.
    """
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    adapted = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            use_rslora=lora.use_rslora,
            target_modules=list(lora.names),
            task_type="CAUSAL_LM",
        ),
    )
    for name, module in adapted.named_modules() if dropped is not None else ():
        if (match := re.fullmatch(r".*\.layers\.(\d+)\.\w+\.(\w+_proj)", name)) and match[2] in lora.names:
            module.lora_dropout["default"] = DropoutByHand(lora.dropout, seed, int(match[1]), match[2], dropped)
    generator = torch.Generator().manual_seed(11)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapted.to(torch.bfloat16).float() if bf16 else adapted


def whole_adapters(student: Any) -> dict[tuple[str, str], torch.nn.Parameter]:
    """(module, `a` or `b`) -> PEFT's parameter."""
    found = {}
    for name, parameter in student.named_parameters():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.default\.weight", name):
            found[match[1], match[2].lower()] = parameter
    return found


def config_of(case: Case, folder: Path) -> Any:
    """The recipe of a case."""
    train = {"train_iters": 1, "global_batch_size": 8, "micro_batch_size": 2, "lr": 1e-3, "seed": 7, **case.train}
    train["adam_eps"] = 1e-5  # a step of Adam magnifies the rounding of gradients that are smaller
    return recipe(
        folder,
        model=str(folder / ("deep_tied" if case.tied else "deep")),
        parallel=ParallelConfig(**case.parallel),
        data=DataConfig(seed=5, max_prompt_length=20),
        train=TrainConfig(**train),
        lora=case.lora,
        # Of the passes that draw and score, where nothing is dropped: by the reference's one pass they cannot be had.
        **({"weighting": UniformWeighting()} if case.lora.dropout else {}),
    )


def run_case(case: Case, folder: Path, mutate: Callable[[Any], Any] | None = None) -> dict[str, float]:
    """One optimiser step; the largest errors of logits, gradients, their norm and the new weights on this rank."""
    from renio_megatron.megatron.model.schedules import run_forward
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.parallel.vocab import gather_columns
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    config = config_of(case, folder)
    layout = start(config.parallel, seed=7)
    with (
        small_buckets() if "overlap_param_gather" in case.parallel else contextlib.nullcontext(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        trainer = build_trainer(config, read_inputs(config), layout, folder / "unused")
    trainer.save_interval = 0
    algorithm, learner = trainer.algorithm, trainer.algorithm.learner
    part = learner.part
    dropped: dict[str, Any] | None = {} if case.lora.dropout else None
    student = peft_student(config.model, case.lora, bf16=config.train.bf16, dropped=dropped)
    whole = whole_adapters(student)
    set_adapters(learner, whole)
    frozen = {name: p.detach().clone() for name, p in part.named_parameters() if not p.requires_grad}
    seen: dict[str, Any] = {}
    sample, step = algorithm.sampler.sample, learner.optimizer.step

    def sample_and_score(*args: Any, **kwargs: Any) -> Any:
        seen["rollouts"] = sample(*args, **kwargs)
        batches = learner.make_micro_batches(seen["rollouts"])
        seen["logits"] = [
            (rows, batch)
            for rows, batch in zip(
                run_forward(part, batches, lambda i, batch, rows: gather_columns(part.head_logits(rows), part.shard)),
                batches,
                strict=False,
            )
        ]
        return seen["rollouts"]

    def look_and_step() -> Any:
        seen["gradients"] = {name: own_part(p, learner) for name, p in part.trained_parameters()}
        return step()

    algorithm.sampler.sample, learner.optimizer.step = sample_and_score, look_and_step
    with mutate(part) if mutate else contextlib.nullcontext():
        metrics = trainer.run()
    part.sync_params()
    errors = _errors(config, seen, metrics, student, whole, learner, dropped)
    return {**errors, "frozen": _largest_change(frozen, part)}


def set_adapters(learner: Any, whole: dict[tuple[str, str], torch.Tensor]) -> None:
    """Gives the student PEFT's adapters, also where the optimiser keeps copies."""
    with torch.no_grad():
        for name, parameter in learner.part.trained_parameters():
            module, target, which = hf_name(name)
            parameter.copy_(cut(whole[module, which], target, which, learner.part))
    learner.optimizer.reload_model_params()


def _errors(
    config: Any,
    seen: dict[str, Any],
    metrics: dict[str, float],
    student: Any,
    whole: dict[tuple[str, str], torch.nn.Parameter],
    learner: Any,
    dropped: dict[str, Any] | None,
) -> dict[str, float]:
    part, layout = learner.part, learner.part.layout
    shares: list[Any] = [None] * layout.data.size
    dist.all_gather_object(shares, seen["rollouts"], group=layout.data.group)
    rollouts = sorted((rollout for share in shares for rollout in share), key=lambda rollout: rollout.prompt.index)
    reference = reference_step(config, rollouts, student)
    plain_logits = reference["logits"]
    if dropped is not None:  # in the step's pass; not where tokens are drawn
        reference = _reference_with_masks(config, rollouts, student, dropped)
    train = config.train
    errors = {"gradient": 0.0, "weight": 0.0, "logits": _logits_error(seen, rollouts, plain_logits)}
    expected_grad = {key: parameter.grad.clone() for key, parameter in whole.items()}
    floor = _bf16_floor(config, rollouts, student, expected_grad) if train.bf16 else 0.0
    norm = torch.nn.utils.clip_grad_norm_(whole.values(), train.clip_grad)
    betas = (train.adam_beta1, train.adam_beta2)
    torch.optim.AdamW(whole.values(), lr=train.lr, betas=betas, eps=train.adam_eps, weight_decay=0.0).step()
    squares: list[tuple[float, float]] = []
    for name, (parameter, gradient, where) in seen["gradients"].items():
        module, target, which = hf_name(name)
        expected = cut(expected_grad[module, which], target, which, part)
        difference = (gradient - expected).flatten()[where]
        squares.append((float(difference.square().sum()), float(expected.square().sum())))
        errors["gradient"] = max(errors["gradient"], float(difference.norm() / expected.norm().clamp(min=1e-12)))
        expected = cut(whole[module, which].detach(), target, which, part)
        errors["weight"] = max(errors["weight"], float((parameter.detach() - expected).norm() / expected.norm()))
    own_logp = torch.cat([rollout.logp for rollout in rollouts])
    tokens = torch.tensor([token for rollout in rollouts for token in rollout.completion_ids])
    logp = (plain_logits / config.loss.temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return {
        **errors,
        "all gradients": (sum(error for error, _ in squares) / sum(size for _, size in squares)) ** 0.5,
        "floor": floor,
        "sampler": float((own_logp - logp).abs().max()),
        "loss": abs(metrics["loss"] - float(reference["loss"].detach())) / float(reference["loss"].detach()),
        "grad_norm": abs(metrics["grad_norm"] - float(norm)) / float(norm),
        "trained": float(
            sum(p.numel() for model in learner.models for buffer in model.buffers for p in buffer.param_index_map)
        ),
        "adapters": float(sum(p.numel() for _, p in part.trained_parameters())),
        "smallest_gradient": min(float(gradient.norm()) for gradient in expected_grad.values()),
    }


def _reference_with_masks(config: Any, rollouts: list[Any], student: Any, dropped: dict[str, Any]) -> dict[str, Any]:
    """The reference step, in which each sequence has the masks of its prompt."""
    numbers = iter([rollout.prompt.index for rollout in rollouts])
    hook = student.register_forward_pre_hook(lambda *_: dropped.update(number=next(numbers)))
    student.zero_grad()
    reference = reference_step(config, rollouts, student)
    hook.remove()
    del dropped["number"]
    return reference


def _bf16_floor(config: Any, rollouts: list[Any], student: Any, expected: dict[tuple[str, str], torch.Tensor]) -> float:
    """Relative error of all gradients that PEFT's own model makes of the same rollouts in bf16, in one process."""
    narrow = copy.deepcopy(student).to(torch.bfloat16)
    reference_step(config, rollouts, narrow)
    pairs = [(parameter.grad.float(), expected[key]) for key, parameter in whole_adapters(narrow).items()]
    error = sum(float((found - right).square().sum()) for found, right in pairs)
    return (error / sum(float(right.square().sum()) for _, right in pairs)) ** 0.5


def _logits_error(seen: dict[str, Any], rollouts: list[Any], expected: torch.Tensor) -> float:
    """Largest absolute error of this rank's logits; 0 where it makes none."""
    starts, start = {}, 0
    for rollout in rollouts:
        starts[rollout.prompt.index] = start
        start += len(rollout.completion_ids)
    places = torch.cat(
        [torch.arange(len(r.completion_ids)) + starts[r.prompt.index] for r in seen["rollouts"]]
    )  # of this rank's flat tokens in the whole batch
    worst = 0.0
    for logits, batch in seen["logits"]:
        difference = (logits - expected[places[batch.token_index]]).abs()
        worst = max([worst, *difference.flatten().tolist()])
    return worst


def _largest_change(before: dict[str, torch.Tensor], part: Any) -> float:
    now = dict(part.named_parameters())
    return max(float((now[name] - value).abs().max()) for name, value in before.items())
