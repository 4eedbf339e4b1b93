"""What would go wrong without the guards of the layouts: each fault is shown, then that the guard keeps it away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from renio_megatron.config import DataConfig, ParallelConfig, TrainConfig
from renio_megatron.data.batching.collate import BatchLayout, collate
from renio_megatron.types import Prompt, Rollout
from tests.helpers.multiprocess import run_ranks
from tests.helpers.training_cases import recipe, save_models
from tests.megatron.layout_cases import Case, run_case

PROMPTS = [Prompt(i, tuple(range(3, 5 + 3 * i)), tuple(range(3, 5 + 3 * i))) for i in range(4)]
ROLLOUTS = [Rollout(prompt, (7, 8, 9, 10)) for prompt in PROMPTS]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _trainer(folder: Path, parallel: ParallelConfig, **train: Any) -> Any:
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    config = recipe(
        folder,
        model=str(folder / "deep"),
        parallel=parallel,
        data=DataConfig(seed=5, max_prompt_length=20),
        train=TrainConfig(**{"train_iters": 1, "global_batch_size": 8, "lr": 1e-2, "seed": 7, **train}),
    )
    trainer = build_trainer(config, read_inputs(config), start(parallel, seed=7), folder / "unused")
    trainer.save_interval = 0
    return trainer


def _batched_sends(folder: Path) -> dict[str, float]:
    """Gradient errors of interleaved stages, with Megatron's default way to send and with ours."""
    from renio_megatron.megatron.model import build

    case = Case("PP2 x VPP2", "recompute full", tied=False, packed=False)
    make = build.transformer_config

    def batched(*args: Any, **kwargs: Any) -> Any:
        config = make(*args, **kwargs)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        return config

    found = {"guarded": run_case(case, folder)["gradient"]}
    with replaced(build, "transformer_config", batched):
        found["fault"] = run_case(case, folder)["gradient"]
    return found


def _small_denominators(folder: Path) -> dict[str, Any]:
    """Gradients where all denominators together are 1/100, with our division and with Megatron's clamped one."""
    from megatron.core.distributed import finalize_model_grads

    from renio_megatron.training.algorithms.sft import token_cross_entropy

    learner = _trainer(folder, ParallelConfig(tensor_model_parallel_size=2)).algorithm.learner
    batches = learner.make_micro_batches(ROLLOUTS)
    seen: list[torch.Tensor] = []

    def look() -> Any:
        seen.append(learner.models[0].buffers[0].grad_data.clone())
        return True, 0.0, None

    def scaled(factor: float) -> Any:
        def loss(*args: Any) -> Any:
            total, count, accumulator = token_cross_entropy(*args)
            return factor * total, factor * count, accumulator

        return loss

    def clamped(model: Any, num_tokens: Any = None, **kwargs: Any) -> None:
        finalize_model_grads(model, learner._denominator.clamp(min=1).float(), **kwargs)

    with replaced(learner.optimizer, "step", look):
        learner.update(batches, scaled(1.0), step=1, lr=0.0)
        learner.update(batches, scaled(0.01 / 16), step=1, lr=0.0)
        with replaced(learner.part.config, "finalize_model_grads_func", clamped):
            learner.update(batches, scaled(0.01 / 16), step=1, lr=0.0)
    whole, small, fault = seen
    return {
        "guarded": float((small - whole).norm() / whole.norm()),
        "fault": float((fault - whole).norm() / whole.norm()),
    }


def _stale_parameters(folder: Path) -> dict[str, Any]:
    """Difference of the weights between two data ranks after a step, before and after they are settled for each use."""
    from renio_megatron.megatron.checkpoint.sharded_state import sharded_weights

    parallel = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    found: dict[str, Any] = {}
    uses = {
        "sampling": lambda learner: learner.part.decoding().__enter__(),
        "scoring": lambda learner: learner.score(learner.make_micro_batches(ROLLOUTS)),
        "saving": lambda learner: sharded_weights(learner.part),
    }
    for name, use in uses.items():
        trainer = _trainer(folder, parallel)
        learner = trainer.algorithm.learner
        trainer.run()
        stale = _difference(learner.part)
        use(learner)
        found[name] = (stale, _difference(learner.part))
    return found


def _difference(part: Any) -> float:
    """Largest difference of a weight between the two ranks."""
    mine = torch.cat([parameter.detach().flatten() for _, parameter in part.named_parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    return float((both[0] - both[1]).abs().max())


def _padding_side(folder: Path) -> dict[str, float]:
    """Change of the completion rows' hidden states by padding on the right, and on the left."""
    from dataclasses import replace

    from renio_megatron.megatron.model.schedules import run_forward

    part = _trainer(folder, ParallelConfig(tensor_model_parallel_size=2)).algorithm.learner.part
    (alone,) = collate(ROLLOUTS[:1], audience="student", batch_layout=BatchLayout(0))
    (right,) = collate(ROLLOUTS[:1], audience="student", batch_layout=BatchLayout(0, sp_size=12))
    shift = right.token_ids.shape[1] - alone.token_ids.shape[1]
    left = replace(right, token_ids=right.token_ids.roll(shift, 1), row_index=right.row_index + shift)
    assert shift > 4
    rows = [run_forward(part, [batch], lambda i, b, hidden: hidden)[0] for batch in (alone, right, left)]
    return {
        "guarded": float((rows[1] - rows[0]).norm() / rows[0].norm()),
        "fault": float((rows[2] - rows[0]).norm() / rows[0].norm()),
    }


def _decoding(folder: Path) -> dict[str, Any]:
    """What decoding makes of each kind of cut sequence, with the guard and without."""
    found: dict[str, Any] = {}
    for name, parallel in {
        "SP": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        "CP": ParallelConfig(context_parallel_size=2),
        "TP": ParallelConfig(tensor_model_parallel_size=2),
    }.items():
        algorithm = _trainer(folder, parallel).algorithm
        sampler, sampling_params, part = algorithm.sampler, algorithm._sampling_params, algorithm.learner.part
        tokens = [rollout.completion_ids for rollout in sampler.sample(PROMPTS, sampling_params, rng_stream=(1,))]
        part.train(False)
        try:  # every rank the same prompts, so that none waits for another
            fault: Any = [rollout.completion_ids for rollout in sampler._decode(PROMPTS, sampling_params, (1,))]
        except (AssertionError, RuntimeError, ValueError) as error:
            fault = type(error).__name__
        found[name] = (tokens, fault)
    return found


def _skipped_step(folder: Path) -> dict[str, Any]:
    """A step with NaN in one rank's gradient and one without, where the user chose to leave such steps out."""
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    trainer = _trainer(folder, parallel, train_iters=2, skip_nonfinite_steps=True)
    learner = trainer.algorithm.learner
    finalize, rows = learner.part.config.finalize_model_grads_func, []
    before = [parameter.detach().clone() for _, parameter in learner.part.named_parameters()]
    unchanged: list[bool] = []

    def poison(model: Any, *args: Any, **kwargs: Any) -> None:
        finalize(model, *args, **kwargs)
        if not rows and dist.get_rank() == 1:
            learner.part.chunks[0].decoder.layers[1].mlp.linear_fc2.weight.main_grad[0, 0] = float("nan")

    def look(step: int, row: dict[str, float]) -> None:
        rows.append(row)
        now = [parameter for _, parameter in learner.part.named_parameters()]
        unchanged.append(all(torch.equal(one, other) for one, other in zip(before, now, strict=True)))

    learner.part.config.finalize_model_grads_func = poison
    trainer.observers = [look]
    trainer.run()
    return {"rows": rows, "unchanged": unchanged}


def _same_bits(folder: Path) -> dict[str, Any]:
    """Weights after a step, twice from the same start, where the user asked for the same bits."""
    from renio_megatron.megatron.runtime.initialize import start

    parallel, ends = ParallelConfig(tensor_model_parallel_size=2), []
    start(parallel, seed=7, deterministic_mode=True)
    for _ in range(2):
        trainer = _trainer(folder, parallel, deterministic_mode=True)
        trainer.run()
        part = trainer.algorithm.learner.part
        ends.append(torch.cat([parameter.detach().flatten() for _, parameter in part.named_parameters()]))
    asked = torch.are_deterministic_algorithms_enabled() and part.config.deterministic_mode
    torch.use_deterministic_algorithms(False)
    return {"asked": asked, "same": torch.equal(*ends)}


def _all(folder: Path) -> dict[str, Any]:
    return {
        "batched sends": _batched_sends(folder),
        "small denominators": _small_denominators(folder),
        "padding side": _padding_side(folder),
        "stale parameters": _stale_parameters(folder),
        "decoding": _decoding(folder),
        "skipped": _skipped_step(folder),
        "same bits": _same_bits(folder),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("guards")
    save_models(folder)
    return run_ranks(_all, 2, folder, timeout=250)


pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("name", "least"), [("batched sends", 0.1), ("small denominators", 0.5), ("padding side", 0.01)]
)
def test_the_fault_is_there_without_the_guard_and_not_with_it(name: str, least: float, found: Any) -> None:
    assert max(rank[name]["fault"] for rank in found) > least
    assert max(rank[name]["guarded"] for rank in found) < 1e-5


@pytest.mark.parametrize("use", ["sampling", "scoring", "saving"])
def test_weights_that_lag_behind_are_gathered_before(use: str, found: Any) -> None:
    for rank in found:
        stale, settled = rank["stale parameters"][use]
        assert stale > 1e-3  # a step of Adam is one learning rate, 1e-2
        assert settled == 0.0


@pytest.mark.parametrize("kind", ["SP", "CP"])
def test_single_tokens_are_decoded_whole(kind: str, found: Any) -> None:
    for rank in found:
        plain, unguarded = rank["decoding"]["TP"]
        assert unguarded == plain  # there is nothing to switch off
        tokens, fault = rank["decoding"][kind]
        assert tokens == plain
        assert fault != plain


def test_a_step_that_is_not_finite_is_left_out_where_the_user_chose_so(found: Any) -> None:
    for rank in found:
        rows, unchanged = rank["skipped"]["rows"], rank["skipped"]["unchanged"]
        assert [row["train/skipped_frac"] for row in rows] == [1.0, 0.0]
        assert "grad_norm" not in rows[0] and rows[1]["grad_norm"] > 0
        assert unchanged == [True, False]


def test_deterministic_mode_is_torchs_and_megatrons_and_gives_the_same_bits(found: Any) -> None:
    assert [rank["same bits"] for rank in found] == [{"asked": True, "same": True}] * 2
