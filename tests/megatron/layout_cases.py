"""The matrix of layouts: its cases, one optimiser step of each through the trainer, and the same step by transformers.

The reference of a case shares nothing with the code under test but the sampled tokens and the table of parameter names:
the models are transformers', the divergence and the weights are written out here, the gradient is autograd's.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.config import DataConfig, HeadConfig, ParallelConfig, TeacherConfig, TrainConfig, WeightingConfig
from renio_megatron.types import Rollout
from tests.helpers.training_cases import recipe

GROUP = 2
TEMPERATURE = 1.1
EMA_BEFORE, EMA_DECAY = 1.7, 0.75
SMALL_PACK, LARGE_PACK = 32, 1000

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 + SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 x VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "DP2": {},
    "CP2 x TP2 + SP": {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "DP2 x TP2": {"tensor_model_parallel_size": 2},
    "TP2 x PP2 + SP": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}
MODELS = (
    ("teacher", 4, 48, False, 0.15),
    ("deep", 4, 32, False, 0.08),
    ("deep_tied", 4, 32, True, 0.08),
    ("shallow_teacher", 2, 48, False, 0.15),
    ("shallow", 2, 32, False, 0.08),
    ("shallow_tied", 2, 32, True, 0.08),
)
"""As those of training_cases. A pipeline's stages have several layers or chunks, which takes 4; elsewhere 2 do."""
FOUR_RANKS = ("CP2 x TP2 + SP", "DP2 x TP2", "TP2 x PP2 + SP")

_OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "distributed optimiser": ({"use_distributed_optimizer": True}, {}),
    "overlap": (_OVERLAP, {}),
    "recompute full": ({}, _FULL),
    "recompute selective": ({}, {"recompute_granularity": "selective"}),
    "bf16": ({}, {"bf16": True}),
}
WEIGHTINGS = {
    "batch": WeightingConfig(threshold=0.3, ceiling=1.5),
    "group": WeightingConfig(threshold=0.3, ceiling=1.5, normalize="group", group_size=GROUP),
    "ema": WeightingConfig(threshold=0.3, ceiling=1.5, normalize="ema", ema_decay=EMA_DECAY),
}


@dataclass(frozen=True)
class Case:
    """One model built once; its steps differ in weighting and micro-batch size."""

    layout: str
    variant: str
    tied: bool
    packed: bool

    @property
    def batch_size(self) -> int:
        """Sequences of a step; in bf16 more of them, whose errors of rounding cancel."""
        return 8 if self.variant == "bf16" else 4

    @property
    def deep(self) -> bool:
        """Whether the layers are shared out to stages."""
        return "PP" in self.layout

    @property
    def name(self) -> str:
        """For the test's id."""
        tied, packed = "tied" if self.tied else "untied", "packed" if self.packed else "padded"
        return f"{self.layout}, {self.variant}, {tied}, {packed}"


def cases(world_size: int) -> Iterator[Case]:
    """All cases that run on so many ranks; neighbours share a layout, whose groups are made once."""
    for layout in LAYOUTS:
        if (layout in FOUR_RANKS) == (world_size == 4):
            for variant, tied, packed in itertools.product(VARIANTS, (False, True), (False, True)):
                if variant != "recompute selective" or (layout in ("TP2 + SP", "CP2") and not tied):
                    yield Case(layout, variant, tied, packed)


def run_case(case: Case, folder: Path) -> dict[str, float]:
    """Steps of every weighting with the smallest and the largest micro-batch, each against the reference.

    The result is the largest of this rank's errors.
    """
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    parallel, train = VARIANTS[case.variant]
    config = recipe(
        folder,
        model=str(folder / f"{'deep' if case.deep else 'shallow'}{'_tied' if case.tied else ''}"),
        teacher=TeacherConfig(model=str(folder / ("teacher" if case.deep else "shallow_teacher"))),
        parallel=ParallelConfig(**LAYOUTS[case.layout], **parallel),
        data=DataConfig(seed=5, max_prompt_length=20),
        train=TrainConfig(
            train_iters=1,
            global_batch_size=case.batch_size,
            lr=1e-3,
            seed=7,
            max_tokens_per_micro_batch=SMALL_PACK if case.packed else None,
            **train,
        ),
    )
    layout = start(config.parallel, seed=7)
    with small_buckets() if case.variant == "overlap" else contextlib.nullcontext():
        trainer = build_trainer(config, read_inputs(config), layout, folder / "unused")
    if case.variant == "overlap" and layout.pipeline.is_first:  # later stages have nothing to overlap with
        assert len(trainer.algorithm.learner.models[0].bucket_groups) > 1
    trainer.save_interval = 0
    algorithm, learner = trainer.algorithm, trainer.algorithm.learner
    seen: dict[str, Any] = {}
    sample, weigh, real_step = algorithm.sampler.sample, algorithm.weigh, learner.optimizer.step
    drawn: list[Any] = []

    def sample_once(*args: Any, **kwargs: Any) -> list[Rollout]:
        if not drawn:
            drawn.append(sample(*args, **kwargs))
        return list(drawn[0])

    def weigh_and_keep(rollouts: Any, *args: Any, **more: Any) -> Any:
        seen["rollouts"], seen["sample"] = rollouts, weigh(rollouts, *args, **more)
        return seen["sample"]

    def look(*, and_step: bool) -> Any:
        seen["gradients"] = {name: own_part(p, learner) for name, p in learner.part.named_parameters()}
        return real_step() if and_step else (True, 0.0, None)

    algorithm.sampler.sample, algorithm.weigh = sample_once, weigh_and_keep
    errors: dict[str, float] = {"gradient": 0.0, "weight": 0.0, "loss": 0.0}
    payload_devices = ["device", "host", "recompute"][: 2 if layout.pipeline.size > 1 else 3]
    steps = list(itertools.product(WEIGHTINGS, (False, True)))
    if case.variant != "plain":  # micro-batch sizes are varied together with the weighting
        steps = [("batch", False), ("group", True), ("ema", False)]
    for number, (name, is_large) in enumerate(steps):
        is_last = number == len(steps) - 1
        trainer.step = trainer.cursor = 0
        algorithm._weighting_state = torch.tensor(EMA_BEFORE, dtype=torch.float64) if name == "ema" else None
        # The loss in chunks of all lengths, the teacher's hidden states from every place where they may wait.
        head, weighting = HeadConfig(chunk_size=(None, 3, 7)[number % 3]), WEIGHTINGS[name]
        algorithm._weighing = replace(algorithm._weighing, weighting=weighting, report=weighting, head=head)
        algorithm.teacher._payload_device = payload_devices[(number + case.packed) % len(payload_devices)]
        _set_micro_batches(algorithm, case, is_large, case.batch_size // layout.data.size)
        learner.optimizer.step = lambda is_last=is_last: look(and_step=is_last)
        metrics = trainer.run()
        found = _compare(case, config, seen, metrics, name, layout, learner.part)
        errors = {key: max(errors[key], found[key]) for key in errors}
        if is_last:
            errors["grad_norm"] = abs(metrics["grad_norm"] - found["reference_norm"]) / found["reference_norm"]
            errors["unlike_1"] = found["unlike_1"]
            errors["tokens"] = found["tokens"]
    return errors


@contextlib.contextmanager
def small_buckets() -> Iterator[None]:
    """Gradients and parameters of these tiny models travel in many pieces, as those of large models do."""
    from renio_megatron.megatron.student import learner

    real = learner.DistributedDataParallelConfig
    learner.DistributedDataParallelConfig = functools.partial(real, bucket_size=4000)  # type: ignore[misc]
    try:
        yield
    finally:
        learner.DistributedDataParallelConfig = real  # type: ignore[misc]


def _set_micro_batches(algorithm: Any, case: Case, is_large: bool, share: int) -> None:
    """One sequence a micro-batch, or as many as the layout allows."""
    interleaved = "VPP" in case.layout
    for owner, part in ((algorithm.learner, algorithm.learner.part), (algorithm.teacher, algorithm.teacher._part)):
        pad_id = owner._batch_layout.pad_id
        if case.packed:
            owner._batch_layout = part.batch_layout(pad_id, 1, LARGE_PACK if is_large else SMALL_PACK)
        else:
            owner._batch_layout = part.batch_layout(pad_id, share // (2 if interleaved else 1) if is_large else 1, None)


def own_part(parameter: torch.Tensor, learner: Any) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """A parameter, its raw gradient, and the part of it, flat, that this rank reduces: a shard, where sharded."""
    gradient = parameter.main_grad.clone()  # type: ignore[attr-defined]
    for model in learner.models:
        if not model.ddp_config.use_distributed_optimizer:
            break
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            if parameter in buffer.param_index_map:
                start, stop, number = buffer.param_index_map[parameter][:3]
                bucket = buffer.buckets[number]
                size = bucket.grad_data.numel() // buffer.data_parallel_group.size()
                first = bucket.offset + buffer.data_parallel_group.rank() * size
                low, high = max(start, first), min(stop, first + size)
                return parameter, gradient, slice(max(0, low - start), max(0, high - start))
    return parameter, gradient, slice(0, gradient.numel())


@dataclass
class Reference:
    """What one process finds for given rollouts: of each sequence, by transformers and autograd.

    Attributes:
        log_ratio: of each sequence's tokens.
        divergence: mean forward KL of each sequence [B].
        gradients: of each sequence's mean divergence, by Hugging Face name, [B, ...].
    """

    log_ratio: list[torch.Tensor]
    divergence: torch.Tensor
    gradients: dict[str, torch.Tensor]


_references: dict[Any, Reference] = {}
"""Of models and rollouts, which most layouts share."""


def reference_of(config: Any, rollouts: list[Rollout], *, bf16: bool) -> Reference:
    """Runs both models on each rollout alone; with `bf16` from weights that were rounded to it."""
    from transformers import AutoModelForCausalLM

    models = []
    for path in (config.model, config.teacher.model):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if bf16 else torch.float32)
        models.append(model.float())
    student, teacher = models
    ratios, divergences, gradients = [], [], []
    for rollout in rollouts:
        logp = []
        for model, prompt in ((student, rollout.prompt.student_ids), (teacher, rollout.prompt.teacher_ids)):
            with torch.set_grad_enabled(model is student):
                logits = model(torch.tensor([prompt + rollout.completion_ids])).logits[0, len(prompt) - 1 : -1]
            logp.append((logits / TEMPERATURE).log_softmax(-1))
        drawn = torch.tensor(rollout.completion_ids)[:, None]
        ratios.append((logp[0] - logp[1]).detach().gather(1, drawn)[:, 0])
        divergence = (logp[1].exp() * (logp[1] - logp[0])).sum(-1).mean()
        student.zero_grad()
        divergence.backward()
        divergences.append(divergence.detach())
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters()})
    stacked = {name: torch.stack([one[name] for one in gradients]) for name in gradients[0]}
    return Reference(ratios, torch.stack(divergences), stacked)


def weights_by_hand(log_ratio: list[torch.Tensor], weighting: WeightingConfig) -> list[float]:
    """The paper's weights of the whole batch, in plain Python."""
    raw = []
    for ratio in log_ratio:
        clipped = [min(value, weighting.ceiling) for value in ratio.tolist()]
        pivotal = [value for value in clipped if value >= weighting.threshold]
        raw.append(math.exp(sum(pivotal) / len(pivotal)) if pivotal else 1.0)
    mean = sum(raw) / len(raw)
    if weighting.normalize == "ema":
        return [weight / (EMA_DECAY * EMA_BEFORE + (1 - EMA_DECAY) * mean) for weight in raw]
    if weighting.normalize == "group":
        groups = [raw[i : i + GROUP] for i in range(0, len(raw), GROUP)]
        return [min(weight / (sum(group) / GROUP), 10.0) for group in groups for weight in group]
    return [min(weight / mean, 10.0) for weight in raw]


def _compare(
    case: Case,
    config: Any,
    seen: dict[str, Any],
    metrics: dict[str, float],
    weighting: str,
    layout: Any,
    part: Any,
) -> dict[str, float]:
    """Errors of one step on this rank."""
    shares: list[Any] = [None] * layout.data.size
    sample = seen["sample"]
    mine = [
        (rollout.prompt.index, rollout, float(weight), ratio)
        for rollout, weight, ratio in zip(
            seen["rollouts"],
            sample.weights,
            sample.renio.log_ratio.split([len(rollout.completion_ids) for rollout in seen["rollouts"]]),
            strict=True,
        )
    ]
    dist.all_gather_object(shares, mine, group=layout.data.group)
    batch = sorted((one for share in shares for one in share), key=lambda one: one[0])
    rollouts = [rollout for _, rollout, _, _ in batch]
    weights = torch.tensor([weight for _, _, weight, _ in batch])
    bf16 = case.variant == "bf16"
    key = (config.model, bf16, tuple(rollout.completion_ids for rollout in rollouts))
    if key not in _references:
        _references[key] = reference_of(config, rollouts, bf16=bf16)
    reference = _references[key]
    # In bf16 a token may lie on the other side of the threshold: weights follow from the run's own ratios there.
    ratios = [ratio for _, _, _, ratio in batch] if bf16 else reference.log_ratio
    expected = torch.tensor(weights_by_hand(ratios, WEIGHTINGS[weighting]))
    loss = float((expected * reference.divergence).sum() / case.batch_size)
    gradients = {
        name: torch.einsum("b,b...->...", expected / case.batch_size, gradient)
        for name, gradient in reference.gradients.items()
    }
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
    return {
        "gradient": _worst_gradient(seen["gradients"], gradients, part, bf16),
        "weight": float((weights - expected).abs().max()),
        "loss": abs(metrics["loss"] - loss) / loss,
        "reference_norm": norm,
        "tokens": float(zlib.crc32(repr([rollout.completion_ids for rollout in rollouts]).encode())),
        "unlike_1": float(sum(abs(weight - 1) > 0.05 for weight in expected)),
    }


def _worst_gradient(
    mine: dict[str, tuple[torch.Tensor, torch.Tensor, slice]], reference: dict[str, torch.Tensor], part: Any, bf16: bool
) -> float:
    """Largest relative error of a tensor's raw gradient, of the part that this rank reduces; in bf16 of all tensors.

    A single process is no nearer to fp32 in bf16: some tensors' gradients are small differences of large numbers.
    """
    from renio_megatron.models.param_map import hf_names
    from tests.helpers.whole_tensors import take_shard, to_megatron

    tensor, pairs = part.layout.tensor, []
    for name, (parameter, gradient, where) in mine.items():
        parts = [reference[hf_name] for hf_name in hf_names(name, part.architecture)]
        whole = to_megatron(name, parts, part.architecture)
        expected = take_shard(name, whole, parameter, tensor.rank, tensor.size)
        difference = (gradient - expected).flatten()[where]
        pairs.append((float(difference.norm()), float(expected.norm())))
    if bf16:
        pairs = [(math.hypot(*(error for error, _ in pairs)), math.hypot(*(size for _, size in pairs)))]
    return max(error / max(size, 1e-12) for error, size in pairs)
