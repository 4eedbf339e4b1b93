"""A step of a student with experts in one process: transformers' models and routers, autograd's gradients.

The load-balancing loss is written out from its definition. Nothing here comes from the code under test but the table of
parameter names that `gradient_errors` compares by.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from renio_megatron.objective.reference import reference_objective
from renio_megatron.types import Rollout


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
        weighting, bounds = config.weighting, config.renio_report
        result = reference_objective(
            torch.cat(rows["student"]),
            torch.cat(rows["teacher"]),
            tokens,
            torch.repeat_interleave(lengths.long()),
            len(rollouts),
            beta=config.loss.beta,
            temperature=config.loss.temperature,
            entry_clip=config.loss.entry_clip,
            threshold=bounds.threshold,
            ceiling=bounds.ceiling,
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
        gates = [name for name in without if name.endswith("gate.weight")]  # frozen beside adapters
        for before, after in ((without[name], hf_gradients(student)[name]) for name in gates):
            found["aux_share"] = max(found["aux_share"], float((after - before).norm() / after.norm()))
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
    from renio_megatron.models.param_map import hf_names, is_expert
    from tests.helpers.whole_tensors import take_shard, to_megatron

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
