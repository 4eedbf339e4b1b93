"""Bytes that a real step of a tiny run allocates on each rank, to hold a plan against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from renio_megatron.config import RunConfig
from renio_megatron.records import Decoding, Prompt, Rollout
from renio_megatron.settings import DataConfig, LoraConfig, ParallelConfig, RolloutConfig, TeacherConfig
from tests.training_cases import layout_of, recipe

PROMPT, COMPLETION = 40, 24
LORA, SOME = LoraConfig(r=4), LoraConfig(r=2, targets=["v_proj", "gate_proj"])


def cases(folder: Path) -> dict[str, RunConfig]:
    """Runs on two ranks, every sequence as long as the recipe allows."""
    base = recipe(folder)
    train = replace(base.train, global_batch_size=8, micro_batch_size=2)
    single = replace(train, micro_batch_size=1)
    full = replace(train, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    pipeline, deep = layout_of(1, 2), str(folder / "deep")
    data = DataConfig(seed=5, max_prompt_length=PROMPT)
    own_teacher = {
        "teacher": TeacherConfig(kind="initial"),
        "data": replace(data, teacher_template="{solution}"),
    }
    settings: dict[str, dict[str, Any]] = {
        "DP2": {},
        "DP2, distributed optimiser, bf16": {
            "parallel": ParallelConfig(use_distributed_optimizer=True),
            "train": replace(train, bf16=True),
        },
        "DP2, packed": {"train": replace(single, max_tokens_per_micro_batch=130)},
        "TP2": {"parallel": layout_of(2), "model": str(folder / "tied")},
        "TP2, computed again": {"parallel": layout_of(2), "train": full},
        "TP2 + SP": {"parallel": layout_of(2, sp=True)},
        "CP2": {"parallel": ParallelConfig(context_parallel_size=2)},
        "CP2, selective": {
            "parallel": ParallelConfig(context_parallel_size=2),
            "train": replace(train, recompute_granularity="selective"),
        },
        "PP2, tied": {"parallel": pipeline, "model": str(folder / "deep_tied"), "train": single},
        "PP2, bf16": {"parallel": pipeline, "model": deep, "train": replace(single, bf16=True)},
        "PP2 x VPP2": {
            "parallel": replace(pipeline, virtual_pipeline_model_parallel_size=2),
            "model": deep,
            "train": single,
        },
        "DP2, adapters": {"lora": LORA},
        "DP2, distributed optimiser, bf16, adapters of some targets": {
            "parallel": ParallelConfig(use_distributed_optimizer=True),
            "train": replace(train, bf16=True),
            "lora": SOME,
        },
        "TP2 + SP, adapters, own teacher": {"parallel": layout_of(2, sp=True), "lora": LORA, **own_teacher},
        "TP2, computed again, adapters": {"parallel": layout_of(2), "train": full, "lora": LORA},
        "CP2, adapters of some targets": {"parallel": ParallelConfig(context_parallel_size=2), "lora": SOME},
        "PP2, tied, adapters, own teacher": {
            "parallel": pipeline,
            "model": str(folder / "deep_tied"),
            "train": single,
            "lora": LORA,
            **own_teacher,
        },
    }
    rollout = RolloutConfig(temperature=1.1, max_completion_length=COMPLETION)
    return {
        name: recipe(folder, **{"data": data, "rollout": rollout, "train": train, **more})
        for name, more in settings.items()
    }


def measure(folder: Path) -> dict[str, dict[str, int]]:
    """Case -> what this rank allocated for it, in bytes."""
    return {name: _measured(config, folder) for name, config in cases(folder).items()}


class Saved:
    """Counts the storages that autograd keeps for the backward pass, each once, and remembers the most.

    Parameters are not counted: `ignored` holds their addresses.
    """

    def __init__(self, ignored: set[int]) -> None:
        self._ignored, self._users, self._now = ignored, {}, 0
        self.most = 0

    def pack(self, tensor: torch.Tensor) -> _Held:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._ignored:
            self._users[key] = self._users.get(key, 0) + 1
            self._now += storage.nbytes() if self._users[key] == 1 else 0
            self.most = max(self.most, self._now)
        return _Held(self, tensor, key)

    def release(self, key: int, num_bytes: int) -> None:
        if key not in self._ignored:
            self._users[key] -= 1
            self._now -= num_bytes if self._users[key] == 0 else 0


class _Held:
    """A saved tensor, until autograd lets it go."""

    def __init__(self, saved: Saved, tensor: torch.Tensor, key: int) -> None:
        self.saved, self.tensor, self.key = saved, tensor, key

    def __del__(self) -> None:
        self.saved.release(self.key, self.tensor.untyped_storage().nbytes())


def _measured(config: RunConfig, folder: Path) -> dict[str, int]:
    from renio_megatron.build import build_trainer, read_inputs
    from renio_megatron.megatron import sampler as sampling
    from renio_megatron.megatron.start import start

    layout = start(config.parallel, seed=config.train.seed)
    trainer = build_trainer(config, read_inputs(config), layout, folder / "unused")
    trainer.save_interval = 0
    algorithm: Any = trainer.algorithm
    learner, found, caches = algorithm.learner, {}, []
    real_sample, real_score, real_update = algorithm.sampler.sample, algorithm.teacher.score, learner.update
    real_context = sampling.StaticInferenceContext

    def remembered(*args: Any) -> Any:
        caches.append(real_context(*args))
        return caches[-1]

    def sample(prompts: Sequence[Prompt], decoding: Decoding, *, stream: tuple[int, ...]) -> list[Rollout]:
        long = [_lengthened(prompt) for prompt in prompts]
        rollouts = real_sample(long, decoding, stream=stream)
        return [Rollout(r.prompt, *_completion(r)) for r in rollouts]

    def score(*args: Any) -> Any:
        scores = real_score(*args)
        found["payload"] = scores.payload_bytes
        return scores

    def update(*args: Any, **kwargs: Any) -> Any:
        saved = Saved({p.untyped_storage().data_ptr() for _, p in learner.part.named_parameters()})
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
            metrics = real_update(*args, **kwargs)
        found["activations"] = saved.most
        return metrics

    algorithm.sampler.sample, algorithm.teacher.score, learner.update = sample, score, update
    sampling.StaticInferenceContext = remembered  # type: ignore[assignment, misc]
    try:
        trainer.run()
    finally:
        sampling.StaticInferenceContext = real_context  # type: ignore[misc]
    found["key-value cache"] = max(
        sum(_bytes(tensor) for pair in cache.key_value_memory_dict.values() for tensor in pair) for cache in caches
    )
    found["parameters"] = sum(_bytes(p) for _, p in learner.part.named_parameters())
    own = {id(p) for _, p in learner.part.named_parameters()}
    teachers = [p for _, p in algorithm.teacher._part.named_parameters() if id(p) not in own]
    found["teacher's parameters"] = sum(map(_bytes, teachers))
    found["gradients"] = sum(_bytes(buffer.grad_data) for model in learner.models for buffer in model.buffers)
    found["optimiser"] = _optimiser_bytes(learner)
    return found


def _lengthened(prompt: Prompt) -> Prompt:
    student, teacher = ((ids * PROMPT)[:PROMPT] for ids in (prompt.student_ids, prompt.teacher_ids))
    return replace(prompt, student_ids=student, teacher_ids=teacher)


def _completion(rollout: Rollout) -> tuple[tuple[int, ...], torch.Tensor]:
    """The drawn tokens, and again, until there are as many as there may be."""
    assert rollout.logp is not None
    return (rollout.completion_ids * COMPLETION)[:COMPLETION], rollout.logp.repeat(COMPLETION)[:COMPLETION]


def _optimiser_bytes(learner: Any) -> int:
    """Moments, and main parameters that are not the model's own."""
    own = {p.untyped_storage().data_ptr() for _, p in learner.part.named_parameters()}
    storages: dict[int, int] = {}
    for one in getattr(learner.optimizer, "chained_optimizers", [learner.optimizer]):
        inner = one.optimizer
        tensors = [p for group in inner.param_groups for p in group["params"]]
        tensors += [value for p in list(tensors) for value in inner.state[p].values() if torch.is_tensor(value)]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
