"""Students and teachers with experts: tiny models, one step through the trainer, and the same step by transformers.

The reference shares nothing with the code under test but the sampled tokens and the table of parameter names: models and
routers are transformers', the load-balancing loss is written out here from its definition, gradients are autograd's.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.objective.reference import reference_objective
from renio_megatron.records import Rollout
from renio_megatron.settings import DataConfig, LoraConfig, ParallelConfig, TeacherConfig, TrainConfig
from renio_megatron.tasks.modchain import build_tokenizer
from tests.training_cases import VOCAB_SIZE, recipe, save_models

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
    """A layout, the trainer's settings, and the student; `changes` replace sections of the recipe."""

    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    model: str = "qwen"
    changes: dict[str, Any] = field(default_factory=dict)


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
    "expert TP2 on data ranks": Case({"expert_tensor_parallel_size": 2}),
    "TP2 + SP": Case(TP2_SP),
    "TP2 + SP, micro-batch 1": Case(TP2_SP, MICRO_1),
    "TP2 + SP, packed": Case(TP2_SP, PACKED),
    "TP2 + SP, mixtral": Case(TP2_SP, model="mixtral"),
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
        **case.changes,
    )


def run_cases(folder: Path, cases: dict[str, Case], mutants: dict[str, tuple[Case, Callable[[], Any]]]) -> dict[str, Any]:
    """Case or mutant -> errors on this rank."""
    found = {name: run_case(case, folder) for name, case in cases.items()}
    for name, (case, mutate) in mutants.items():
        with mutate():
            found[name] = run_case(case, folder)
    return found


def run_case(case: Case, folder: Path) -> dict[str, float]:
    """One optimiser step; this rank's errors against the single process."""
    from renio_megatron.build import build_trainer, read_inputs
    from renio_megatron.megatron.start import start
    from tests.layout_cases import own_part

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

    def weigh_and_keep(rollouts: Any, *args: Any) -> Any:  # packing may have dealt them out to other ranks
        seen["rollouts"], seen["sample"] = rollouts, weigh(rollouts, *args)
        return seen["sample"]

    algorithm.weigh = weigh_and_keep
    learner.optimizer.step = look_and_step
    metrics = trainer.run()

    shares: list[Any] = [None] * layout.data.size
    mine = [(r.prompt.index, r, w) for r, w in zip(seen["rollouts"], seen["sample"].weights.tolist(), strict=True)]
    dist.all_gather_object(shares, mine, group=layout.data.group)
    batch = sorted(itertools.chain.from_iterable(shares), key=lambda one: one[0])
    rollouts, weights = [one[1] for one in batch], torch.tensor([one[2] for one in batch])
    reference = reference_step(config, rollouts, given_weights=weights if config.train.bf16 else None)
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


def load_balancing(logits: torch.Tensor, chosen: int) -> torch.Tensor:
    """E sum_e f_e P_e of one sequence's router logits [T, E], as the papers write it."""
    num_tokens, num_experts = logits.shape
    probability = torch.softmax(logits, -1)
    total = logits.new_zeros(())
    for expert in range(num_experts):
        choices = sum(expert in token.topk(chosen).indices.tolist() for token in logits.detach())
        f = choices / (chosen * num_tokens)
        total = total + num_experts * f * probability[:, expert].mean()
    return total


def reference_step(
    config: Any,
    rollouts: list[Rollout],
    *,
    given_weights: torch.Tensor | None = None,
    per_token: bool = False,
    student: Any = None,
) -> dict[str, Any]:
    """Loss, weights, gradients and routers' loads of the whole batch in one process; `per_token` is fine-tuning's."""
    from transformers import AutoModelForCausalLM

    rounded = (lambda model: model.to(torch.bfloat16).float()) if config.train.bf16 else (lambda model: model)
    if student is None:
        student = rounded(AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32))
    num_layers, chosen = student.config.num_hidden_layers, getattr(student.config, "num_experts_per_tok", None)
    rows: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    routers: list[tuple[torch.Tensor, ...]] = []
    models = {"student": student}
    if not per_token:
        models["teacher"] = rounded(
            AutoModelForCausalLM.from_pretrained(config.teacher.model or config.model, dtype=torch.float32)
        )
    for rollout, (who, model) in itertools.product(rollouts, models.items()):
        prompt = rollout.prompt.student_ids if who == "student" else rollout.prompt.teacher_ids
        wants_routers = {"output_router_logits": True} if who == "student" and chosen else {}
        with torch.set_grad_enabled(who == "student"):
            # The last token is not read.
            read = torch.tensor([(prompt + rollout.completion_ids)[:-1]])
            output = model(read, **wants_routers)
        rows[who].append(output.logits[0, len(prompt) - 1 :])
        if wants_routers:
            routers.append(output.router_logits)
    tokens = torch.tensor([token for rollout in rollouts for token in rollout.completion_ids])
    logp = (torch.cat(rows["student"]) / (1.0 if per_token else config.loss.temperature)).log_softmax(-1)
    drawn = logp.gather(1, tokens[:, None])[:, 0]
    lengths = torch.tensor([float(len(rollout.completion_ids)) for rollout in rollouts])
    result: dict[str, Any] = {"weights": torch.ones(len(rollouts))}
    if per_token:
        result["loss"], shares = -drawn.mean(), lengths / lengths.sum()
    else:
        weighting = config.weighting
        result = reference_objective(
            torch.cat(rows["student"]),
            torch.cat(rows["teacher"]),
            tokens,
            torch.repeat_interleave(lengths.long()),
            len(rollouts),
            beta=config.loss.beta,
            temperature=config.loss.temperature,
            entry_clip=config.loss.entry_clip,
            threshold=weighting.threshold,
            ceiling=weighting.ceiling,
            uniform=weighting.name == "uniform",
        )
        shares = torch.full((len(rollouts),), 1 / len(rollouts))
        if given_weights is not None:  # in bf16 a token may lie on the other side of the threshold
            teacher = (torch.cat(rows["teacher"]) / config.loss.temperature).log_softmax(-1)
            divergence = (teacher.exp() * (teacher - logp)).sum(-1)
            means = torch.stack([part.mean() for part in divergence.split(lengths.long().tolist())])
            result = {"loss": (given_weights * means).mean(), "weights": given_weights}
    found = {"metrics": {}, "aux_share": 0.0, "idle_experts": 0.0}
    result["loss"].backward(retain_graph=bool(routers))
    if routers:
        without = {name: gradient.clone() for name, gradient in hf_gradients(student).items()}
        layers = [[one[layer] for one in routers] for layer in range(num_layers)]
        losses = torch.stack([torch.stack([load_balancing(one, chosen) for one in layer]) for layer in layers])
        balance = (losses * shares).sum()
        (config.train.moe_aux_loss_coeff * balance).backward()
        gate = next(name for name in without if name.endswith("gate.weight"))
        after = hf_gradients(student)[gate]
        found["aux_share"] = float((after - without[gate]).norm() / after.norm())
        loads = [
            torch.cat(layer).topk(chosen).indices.flatten().bincount(minlength=layer[0].shape[1]).double()
            for layer in layers
        ]
        entropy = torch.cat([torch.distributions.Categorical(logits=torch.cat(layer)).entropy() for layer in layers])
        found["idle_experts"] = float(sum((load == 0).sum() for load in loads))
        found["metrics"] = {
            "moe/aux_loss": float(balance.detach()) / num_layers,
            "moe/load_max_over_mean": max(float(load.max() / load.mean()) for load in loads),
            "moe/idle_frac": found["idle_experts"] / sum(len(load) for load in loads),
            "moe/router_entropy": float(entropy.mean().detach()),
        }
    gradients = hf_gradients(student)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
    loss = float(result["loss"].detach())
    return {**result, **found, "loss": loss, "gradients": gradients, "grad_norm": norm, "logp": drawn.detach()}


def hf_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of transformers' model by the names that its weights have on the disk: one for each expert."""
    is_mixtral = model.config.model_type == "mixtral"
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        grad = parameter.grad.detach()
        place = name.replace(".mlp.", ".block_sparse_moe.") if is_mixtral else name
        base, _, last = place.rpartition(".")
        gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        if last == "gate_up_proj":
            for number, both in enumerate(grad):
                parts = both.chunk(2)
                found |= {f"{base}.{number}.{gate}.weight": parts[0], f"{base}.{number}.{up}.weight": parts[1]}
        elif last == "down_proj" and ".experts" in base:
            found |= {f"{base}.{number}.{down}.weight": one for number, one in enumerate(grad)}
        else:
            found[place if ".experts" in place or "gate.weight" in place else name] = grad
    return found


def gradient_errors(mine: dict[str, Any], reference: dict[str, torch.Tensor], part: Any) -> dict[str, float]:
    """Largest relative error of a tensor's raw gradient, of the part that this rank reduces: experts, router, others.

    Relative to the tensor's own norm; an expert without tokens has none, and is held to the largest expert's.
    """
    from renio_megatron.megatron.hf_slices import hf_names, is_expert
    from tests.whole_tensors import take_shard, to_megatron

    errors = {"experts": 0.0, "router": 0.0, "others": 0.0}
    squares: list[tuple[float, float]] = []
    for name, (parameter, gradient, where) in mine.items():
        axis = part.layout.expert_tensor if is_expert(name) else part.layout.tensor
        whole = to_megatron(name, [reference[n] for n in hf_names(name, part.architecture)], part.architecture)
        expected = take_shard(name, whole, parameter, axis.rank, axis.size)
        difference, size = (gradient - expected).flatten()[where].norm(), expected.norm()
        kind = "experts" if is_expert(name) else "router" if "router" in name else "others"
        if size > 0:
            errors[kind] = max(errors[kind], float(difference / size))
        else:
            errors[kind] = max(errors[kind], float(gradient.abs().max()))
        squares.append((float(difference.square()), float(expected.flatten()[where].square().sum())))
    all_squares = [sum(part) for part in zip(*squares, strict=True)]
    return {**errors, "all": math.sqrt(all_squares[0] / max(all_squares[1], 1e-30))}


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
