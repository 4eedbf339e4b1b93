"""Bytes that a real step of a tiny run allocates on each rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from renio_megatron.config.schema import DistillationConfig
from renio_megatron.types import Prompt, Rollout, SamplingParams
from tests.helpers.scoring_ranks import answer, on_scoring_ranks
from tests.tools.plan_cases import COMPLETION, PROMPT, cases, dedicated_cases, expert_cases, own_cases


def measure(name: str, folder: Path) -> dict[str, Any]:
    """What this rank of two allocated for a case, in bytes, and where it was."""
    return _measured((cases(folder) | own_cases(folder) | expert_cases(folder))[name], folder)


def measure_dedicated(name: str, folder: Path) -> dict[str, Any]:
    """The same of one of the cases in which half of four ranks only score."""

    def serve(teachers: list[Any], layout: Any) -> dict[str, Any]:
        (teacher,) = teachers
        seen: dict[str, Any] = {"stages": (None, layout.pipeline.rank)}
        _watch_table(teacher, seen)
        answer(teachers)
        return seen | _teacher_bytes(teacher, set()) | _left_bytes([teacher._reader.part])

    run = {name: dedicated_cases(folder)[name]}
    return on_scoring_ranks(run, folder, train=lambda config: _measured(config, folder), serve=serve)[name]


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
        # Detached, because an operation's own result would hold what holds it, and stay where no backward pass comes.
        return _Held(self, tensor.detach(), key)

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


def _measured(config: DistillationConfig, folder: Path) -> dict[str, Any]:
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.megatron.student import sampler as sampling
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    config = replace(config, canaries="off")  # nobody drew the completions, as a look at the first step would see
    layout = start(config.parallel, seed=config.train.seed)
    trainer = build_trainer(config, read_inputs(config), layout, folder / "unused")
    trainer.save_interval = 0
    algorithm: Any = trainer.algorithm
    learner, teacher, caches = algorithm.learner, algorithm.teacher, []
    found: dict[str, Any] = {}
    real_context = sampling.StaticInferenceContext

    def remembered(*args: Any) -> Any:
        caches.append(real_context(*args))
        return caches[-1]

    _watch(algorithm, found)
    sampling.StaticInferenceContext = remembered  # type: ignore[assignment, misc]
    try:
        trainer.run()
    finally:
        sampling.StaticInferenceContext = real_context  # type: ignore[misc]
    algorithm.close()
    own = {id(p) for _, p in learner.part.named_parameters()}
    parts = [learner.part] + ([] if (part := part_of(teacher)) in (None, learner.part) else [part])
    buffers = [buffer for model in learner.models for buffer in (*model.buffers, *model.expert_parallel_buffers)]
    return {
        **found,
        **_teacher_bytes(teacher, own),
        **_left_bytes(parts),
        "stages": (layout.pipeline.rank, None if part is None else part.layout.pipeline.rank),
        "key-value cache": max(
            sum(_bytes(tensor) for pair in cache.key_value_memory_dict.values() for tensor in pair) for cache in caches
        ),
        "parameters": sum(_bytes(p) for _, p in learner.part.named_parameters()),
        "gradients": sum(_bytes(buffer.grad_data) for buffer in buffers),
        "optimizer": _optimizer_bytes(learner),
    }


def part_of(teacher: Any) -> Any:
    """The modules with which a teacher reads on this rank; None where it has none here."""
    if hasattr(teacher, "weights"):
        return teacher.weights.part
    return None if teacher._reader is None else teacher._reader.part


def _watch(algorithm: Any, found: dict[str, Any]) -> None:
    """Makes rollouts as long as they may be, and notes what the passes of the step hold."""
    learner, teacher = algorithm.learner, algorithm.teacher
    real_sample, real_score, real_update = algorithm.sampler.sample, teacher.score, learner.update

    def sample(
        prompts: Sequence[Prompt], sampling_params: SamplingParams, *, rng_stream: tuple[int, ...], **_: Any
    ) -> list[Rollout]:
        long = [_lengthened(prompt) for prompt in prompts]
        rollouts = real_sample(long, sampling_params, rng_stream=rng_stream)
        return [Rollout(r.prompt, *_completion(r)) for r in rollouts]

    def score(*args: Any) -> Any:
        scores = real_score(*args)
        waiting = getattr(scores.payload, "_pieces", None) or getattr(scores.payload, "_parts", [])
        found["payload"] = found["payload in use"] = _storages(waiting)
        if len(scores.payload):
            fetch = scores.payload.fetch

            def fetched(number: int) -> torch.Tensor:
                whole = fetch(number)
                found["payload in use"] = max(found["payload in use"], _storages([*waiting, whole]))
                return whole

            if not isinstance(scores.payload, list):
                scores.payload.fetch = fetched
        return scores

    def update(*args: Any, **kwargs: Any) -> Any:
        saved = Saved({p.untyped_storage().data_ptr() for _, p in learner.part.named_parameters()})
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
            metrics = real_update(*args, **kwargs)
        found["activations"] = saved.most
        return metrics

    algorithm.sampler.sample, teacher.score, learner.update = sample, score, update
    if not hasattr(teacher, "weights"):
        _watch_table(teacher, found)


def _watch_table(teacher: Any, found: dict[str, Any]) -> None:
    """Notes what a detached teacher's hidden states take before they travel."""
    find = teacher._collect

    def watched(*args: Any) -> Any:
        register, logp_of, states_of = find(*args)
        cells = [cell.cell_contents for cell in states_of.__closure__ or ()]
        tables = [cell for cell in cells if torch.is_tensor(cell) and cell.is_floating_point()]
        found["hidden states"] = _storages(tables)
        return register, logp_of, states_of

    teacher._collect = watched


def _teacher_bytes(teacher: Any, own: set[int]) -> dict[str, int]:
    """Of its weights that are not among the parameters `own`, and of a copy of its LM head."""
    part = part_of(teacher)
    parameters = [] if part is None else [p for _, p in part.named_parameters() if id(p) not in own]
    found = {"teacher's parameters": sum(map(_bytes, parameters))}
    if not hasattr(teacher, "weights"):
        found["teacher's LM head"] = 0 if teacher._head is None else _storages([teacher.head.weight])
    return found


def _left_bytes(parts: Sequence[Any]) -> dict[str, int]:
    """What Megatron keeps after the passes of models: buffers of gathered sequences, and what routers last said."""
    from megatron.core import parallel_state

    from renio_megatron.megatron.runtime import process_groups

    states = [vars(parallel_state), *process_groups._known.values()]
    memory = {id(one): one for state in states if (one := state.get("_GLOBAL_MEMORY_BUFFER")) is not None}
    gathered = [tensor for one in memory.values() for (name, _), tensor in one.buffer.items() if name == "mpu"]
    dispatchers = [
        module.token_dispatcher
        for part in parts
        for chunk in part.chunks
        for module in chunk.modules()
        if hasattr(module, "token_dispatcher")
    ]
    routed = [
        tensor
        for one in dispatchers
        for tensor in (one.probs, one.routing_map, one.reversed_local_input_permutation_mapping)
    ]
    found = {"gathered sequence": _storages(gathered), "routing of the last pass": _storages(routed)}
    for one in memory.values():  # for the next case
        one.buffer.clear()
    return found


def _storages(tensors: Iterable[torch.Tensor]) -> int:
    """Memory of tensors, each once where they share it."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def _lengthened(prompt: Prompt) -> Prompt:
    student, teacher = ((ids * PROMPT)[:PROMPT] for ids in (prompt.student_ids, prompt.teacher_ids))
    return replace(prompt, student_ids=student, teacher_ids=teacher)


def _completion(rollout: Rollout) -> tuple[tuple[int, ...], torch.Tensor]:
    """The drawn tokens, and again, until there are as many as there may be."""
    assert rollout.logp is not None
    return (rollout.completion_ids * COMPLETION)[:COMPLETION], rollout.logp.repeat(COMPLETION)[:COMPLETION]


def _optimizer_bytes(learner: Any) -> int:
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
