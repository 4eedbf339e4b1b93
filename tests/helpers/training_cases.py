"""A tiny student and teacher, one optimiser step through the real trainer, and the same step by transformers alone.

The reference shares nothing with the code under test but the sampled tokens and the table of parameter names: models
are transformers', the objective is `objective/reference.py` in autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.config import (
    DataConfig,
    LossConfig,
    ParallelConfig,
    RolloutConfig,
    TeacherConfig,
    TrainConfig,
    WeightingConfig,
)
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.data.sources.modchain import build_tokenizer
from renio_megatron.objective.reference import reference_objective
from renio_megatron.types import Rollout
from tests.helpers.weights_by_hand import weights_by_hand, without_order

VOCAB_SIZE = 17


MODELS = (
    ("student", 2, 32, False, 0.15),
    ("tied", 2, 32, True, 0.15),
    ("teacher", 4, 48, False, 0.15),
    ("deep", 4, 32, False, 0.08),
    ("deep_tied", 4, 32, True, 0.08),
)
"""Name, layers, hidden size, tied embeddings, noise; bf16 rounds rough models badly, also in a single process."""


def save_models(folder: Path, models: Sequence[tuple[str, int, int, bool, float]] = MODELS) -> None:
    """Models of one vocabulary, with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    for seed, (name, layers, hidden, tied, noise) in enumerate(models):
        config = Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=tied,
            max_position_embeddings=128,
        )
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        for parameter in model.parameters():  # norms away from 1, logits away from uniform: some tokens must be pivotal
            parameter.data += noise * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        build_tokenizer(folder / name)


def recipe(folder: Path, **changes: Any) -> DistillationConfig:
    """A run of one step of 8 sequences; `changes` replace whole sections or top-level values."""
    config = DistillationConfig(
        model=str(folder / "student"),
        teacher=TeacherConfig(model=str(folder / "teacher")),
        data=DataConfig(seed=5),
        rollout=RolloutConfig(temperature=1.1, top_p=0.95, max_completion_length=6),
        loss=LossConfig(beta=0.0, temperature=1.1),
        weighting=WeightingConfig(threshold=0.3, ceiling=1.5),
        train=TrainConfig(train_iters=1, global_batch_size=8, micro_batch_size=2, lr=1e-3, seed=7),
        output_dir=str(folder / "run"),
    )
    return replace(config, **changes)


def layout_of(tp: int = 1, pp: int = 1, *, sp: bool = False) -> ParallelConfig:
    """Tensor and pipeline sizes, and sequence parallelism; ranks beyond them are data-parallel."""
    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sp)


def trainer_of(config: Any, folder: Path) -> Any:
    """A run's trainer on this rank, which saves nothing."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    layout = start(config.parallel, seed=config.train.seed)
    trainer = build_trainer(config, read_inputs(config), layout, folder / "unused")
    trainer.save_interval = 0
    return trainer


def one_step(config: DistillationConfig, folder: Path, draw: Any = None) -> dict[str, Any]:
    """One optimiser step through `Trainer.run`, compared on this rank with the single-process reference.

    Args:
        config: the run.
        folder: for files that are not kept.
        draw: takes the place of the sampler's `sample`.

    Returns:
        tokens of all rollouts in the global order, weights, loss, and the worst relative errors against the reference.
    """
    trainer = trainer_of(config, folder)
    layout = trainer.algorithm.learner.part.layout
    seen: dict[str, Any] = {}
    algorithm = trainer.algorithm
    sample, weigh, optimizer = draw or algorithm.sampler.sample, algorithm.weigh, algorithm.learner.optimizer
    real_step = optimizer.step

    def step_after_looking() -> Any:
        seen["gradients"] = {
            name: (parameter, parameter.main_grad.clone())
            for name, parameter in algorithm.learner.part.named_parameters()
        }
        return real_step()

    make_micro_batches = algorithm.learner.make_micro_batches
    algorithm.sampler.sample = sample
    algorithm.learner.make_micro_batches = lambda exchanged: make_micro_batches(seen.setdefault("rollouts", exchanged))
    algorithm.weigh = lambda *args, **more: seen.setdefault("sample", weigh(*args, **more))
    optimizer.step = step_after_looking
    metrics = trainer.run()
    algorithm.close()

    shares: list[Any] = [None] * layout.data.size
    token_weights = seen["sample"].token_weights
    own = (seen["rollouts"], seen["sample"].weights.tolist(), [] if token_weights is None else token_weights.tolist())
    dist.all_gather_object(shares, own, group=layout.data.group)
    rollouts, weights, token_weights = (list(itertools.chain.from_iterable(one)) for one in zip(*shares, strict=True))
    is_permuted = any(part.inner is not None for part in config.weighting.parts)
    reference = reference_step(config, rollouts, found=(weights, token_weights) if is_permuted else None)
    return {
        "prompts": [rollout.prompt.student_ids for rollout in rollouts],
        "tokens": [rollout.completion_ids for rollout in rollouts],
        "unread": [rollout.unread_ids for rollout in rollouts],
        "weights": weights,
        "token_weights": token_weights,
        "loss": metrics["loss"],
        "sent_mb": metrics.get("teacher/payload_sent_mb"),
        "by_teacher": {name: value for name, value in metrics.items() if name.count("/") == 2},
        "reference_by_teacher": _by_teacher(rollouts, reference),
        "raw_weights_not_1": int((reference["raw_weights"] != 1).sum()),
        "gradient_error": worst_gradient_error(seen["gradients"], reference["gradients"], algorithm.learner.part),
        "grad_norm_error": abs(metrics["grad_norm"] - reference["grad_norm"]) / reference["grad_norm"],
        "loss_error": abs(metrics["loss"] - float(reference["loss"].detach())) / float(reference["loss"].detach()),
        "weight_error": _weight_error(weights, token_weights, reference, rollouts, is_permuted=is_permuted),
    }


def _weight_error(
    weights: list[float],
    token_weights: list[float],
    reference: dict[str, Any],
    rollouts: list[Rollout],
    *,
    is_permuted: bool,
) -> float:
    """Largest difference of a weight; of permuted ones whatever their order."""
    expected, expected_N = reference["weights"], reference["token_weights"]
    found, found_N = (
        torch.tensor(weights),
        torch.tensor(token_weights) if token_weights else torch.ones_like(expected_N),
    )
    if is_permuted:
        lengths = [len(rollout.completion_ids) for rollout in rollouts]
        return float(
            (without_order(found, found_N, lengths) - without_order(expected, expected_N, lengths)).abs().max()
        )
    return max(float((found - expected).abs().max()), float((found_N - expected_N).abs().max()))


def reference_step(
    config: DistillationConfig,
    rollouts: list[Rollout],
    student: Any = None,
    found: tuple[list[float], list[float]] | None = None,
) -> dict[str, Any]:
    """Loss, weights and gradients of the whole batch in one process, by transformers and autograd.

    `student` takes the place of the model of `config`, and `found`, weights of sequences and tokens that were permuted,
    that of its weights in the loss.
    """
    from transformers import AutoModelForCausalLM

    if student is None:
        student = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    paths = {name: one.model or config.model for name, one in config.teacher.routes.items()}
    paths = paths or {"": config.teacher.model or config.model}
    teachers = {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for name, path in paths.items()}
    rows: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    for rollout in rollouts:
        for who, model, prompt in (
            ("student", student, rollout.prompt.student_ids),
            ("teacher", teachers[rollout.prompt.teacher], rollout.prompt.teacher_ids),
        ):
            ids = torch.tensor([prompt + rollout.completion_ids])
            with torch.set_grad_enabled(who == "student"):
                logits = model(ids).logits[0]
            rows[who].append(logits[len(prompt) - 1 : -1])
    weighting, bounds = config.weighting, config.renio_report or recipe(Path()).renio_report
    assert bounds is not None
    result = reference_objective(
        torch.cat(rows["student"]),
        torch.cat(rows["teacher"]),
        torch.tensor([token for rollout in rollouts for token in rollout.completion_ids]),
        torch.tensor([i for i, rollout in enumerate(rollouts) for _ in rollout.completion_ids]),
        len(rollouts),
        beta=config.loss.beta,
        temperature=config.loss.temperature,
        entry_clip=config.loss.entry_clip,
        threshold=bounds.threshold,
        ceiling=bounds.ceiling,
        uniform=weighting.name == "uniform",
    )
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    result["token_weights"] = torch.ones(sum(lengths))
    if weighting.name not in ("renio", "uniform"):
        assert config.loss == replace(LossConfig(), temperature=config.loss.temperature), "of the forward KL alone"
        logp, teacher_logp = (
            (torch.cat(rows[who]) / config.loss.temperature).log_softmax(-1) for who in ("student", "teacher")
        )
        divergence = (teacher_logp.exp() * (teacher_logp - logp)).sum(-1)
        weights, token_weights, counts = weights_by_hand(
            weighting, result["raw_weights"], logp.detach(), teacher_logp.detach(), lengths
        )
        result |= {"weights": weights, "token_weights": token_weights}
        if found is not None:
            weights = torch.tensor(found[0])
            token_weights = torch.tensor(found[1]) if found[1] else token_weights
        parts = (token_weights * divergence).split(lengths)
        sums = torch.stack([one.sum() for one in parts])
        result["loss"] = (weights * sums / counts.clamp(min=1)).mean()
    result["loss"].backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    norm = torch.sqrt(sum(gradient.double().square().sum() for gradient in gradients.values()))
    logits = torch.cat(rows["student"]).detach()
    return {**result, "logits": logits, "gradients": gradients, "grad_norm": float(norm)}


def _by_teacher(rollouts: list[Rollout], reference: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each of several teachers its share of the sequences, mean divergence at their tokens and mean raw weight."""
    divergence = reference["token_divergence"].split([len(rollout.completion_ids) for rollout in rollouts])
    found = {}
    for name in dict.fromkeys(rollout.prompt.teacher for rollout in rollouts):
        mine = [i for i, rollout in enumerate(rollouts) if rollout.prompt.teacher == name]
        found[name] = {
            "sequences_frac": len(mine) / len(rollouts),
            "kl": float(torch.cat([divergence[i] for i in mine]).double().mean()),
            "raw_weight_mean": float(reference["raw_weights"][mine].double().mean()),
        }
    return found


def worst_gradient_error(
    mine: dict[str, tuple[torch.Tensor, torch.Tensor]], reference: dict[str, torch.Tensor], part: Any
) -> float:
    """Largest relative error, over this rank's parameters, of the raw gradient against the reference's shard of it."""
    from renio_megatron.models.param_map import hf_names
    from tests.helpers.whole_tensors import take_shard, to_megatron

    worst, tensor = 0.0, part.layout.tensor
    for name, (parameter, gradient) in mine.items():
        parts = [reference[hf_name] for hf_name in hf_names(name, part.architecture)]
        whole = to_megatron(name, parts, part.architecture)
        expected = take_shard(name, whole, parameter, tensor.rank, tensor.size)
        worst = max(worst, float((gradient - expected).norm() / expected.norm().clamp(min=1e-12)))
    return worst
