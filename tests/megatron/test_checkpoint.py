"""Saving: asynchronous, kept and deleted, refused by the disk; taken over by another run; asked for by SIGTERM."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from renio_megatron.config import CheckpointConfig, ParallelConfig
from renio_megatron.config.resume import to_yaml
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.megatron.checkpoint.directory import latest_step, steps
from tests.helpers.multiprocess import run_ranks
from tests.helpers.resuming import error_of, full_at_step_4, rows, run, run_config, same, tensors, train_config
from tests.helpers.training_cases import VOCAB_SIZE, save_models


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def _barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


def _asynchronous(config: DistillationConfig) -> dict[str, Any]:
    """A run with a writer that takes its time; which checkpoint was in force before each step, and who waited."""
    root = Path(config.output_dir) / "checkpoints"
    in_force: dict[int, Any] = {}

    def before_step(trainer: Any, step: int) -> None:
        calls = trainer.checkpointer._queue.async_calls
        if step == 4:  # the checkpoint of step 2 is written during steps 3 and 4; nobody waited for it so far
            for call in calls:
                call.async_caller.process.join()
        _barrier()
        in_force[step] = (latest_step(root), len(calls))
        _barrier()

    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as Writer

    write = Writer.write_preloaded_data

    def write_slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(1.0)
        return write(*args, **kwargs)

    Writer.write_preloaded_data = staticmethod(write_slowly)
    try:
        outcome = run(config, before_step=before_step)
    finally:
        Writer.write_preloaded_data = staticmethod(write)
    return {**outcome, "in force": in_force}


def _sigterm(config: DistillationConfig) -> dict[str, Any]:
    """SIGTERM reaches rank 1 alone, in the update of step 3, which is not given up; then the same command."""

    def before_step(trainer: Any, step: int) -> None:
        learner = trainer.algorithm.learner
        update = learner.update

        def killed(*args: Any, **settings: Any) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            return update(*args, **settings)

        if _rank() == 1 and step == 3:
            learner.update = killed

    stopped = run(config, before_step=before_step)
    in_force = latest_step(Path(config.output_dir) / "checkpoints")
    _barrier()
    return {"outcome": stopped["outcome"], "in force": in_force, "again": run(config)}


def _saved_twice(config: DistillationConfig) -> tuple[int, int]:
    """Times of the checkpoint of step 5 before and after it is saved once more."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    root = Path(config.output_dir) / "checkpoints"
    trainer = build_trainer(config, read_inputs(config), start(config.parallel, seed=1), root)
    trainer.resume()
    before = (root / "iter_0000005").stat().st_mtime_ns
    trainer.checkpointer.save(5, {})
    _barrier()
    return before, (root / "iter_0000005").stat().st_mtime_ns


def _copied(folder: Path, name: str) -> Path:
    """The run `sync` under another name, as if it had been killed after its last checkpoint; made by rank 0."""
    copy = folder / name
    if _rank() == 0:
        shutil.copytree(folder / "sync", copy)
        (copy / "finished.json").unlink()
        (copy / "config.yaml").write_text(to_yaml(run_config(folder, name)))
    _barrier()
    return copy / "checkpoints"


def _refused(folder: Path) -> dict[str, str]:
    """What is said about checkpoints that cannot be used."""
    messages = {}
    damages = {
        "truncated": lambda newest: [path.write_bytes(path.read_bytes()[:100]) for path in newest.glob("__1_*.distcp")],
        "no index": lambda newest: (newest / ".metadata").unlink(),
        "no common": lambda newest: (newest / "common.pt").write_bytes(b"\0" * 50),
        "garbage": lambda newest: (newest / ".metadata").write_bytes(b"\0" * 99),
        "foreign": lambda newest: torch.save({"args": 1}, newest / "common.pt"),
        "none": lambda newest: shutil.rmtree(newest),
    }
    for name, harm in damages.items():
        root = _copied(folder, name)
        if _rank() == 0:
            harm(root / "iter_0000005")
        _barrier()
        messages[name] = error_of(lambda name=name: run(run_config(folder, name)))
    if _rank() == 0:
        (folder / "blocked").mkdir()
        (folder / "blocked" / "config.yaml").write_text(to_yaml(run_config(folder, "blocked")))
        (folder / "blocked" / "checkpoints").write_text("a file")
    _barrier()
    messages["blocked"] = error_of(lambda: run(run_config(folder, "blocked")))
    return messages


def _taken_over(folder: Path) -> dict[str, Any]:
    """Runs that start from a checkpoint of another one."""
    found: dict[str, Any] = {}
    source = CheckpointConfig(save_interval=2, load=str(folder / "sync" / "checkpoints" / "iter_0000002"))
    found["from step"] = run(run_config(folder, "from step", checkpoint=source))
    config = run_config(folder, "longer", checkpoint=CheckpointConfig(load=str(folder / "sync")))
    config = replace(config, train=train_config(train_iters=6, weight_decay=0.25, adam_beta2=0.5))
    settings: list[Any] = []

    def before_step(trainer: Any, step: int) -> None:
        groups = trainer.algorithm.learner.optimizer.param_groups
        settings.append((step, [(group["weight_decay"], tuple(group["betas"])) for group in groups]))

    run(config, before_step=before_step)
    found["settings"] = settings
    nowhere = CheckpointConfig(load=str(folder / "student"))
    found["nowhere"] = error_of(lambda: run(run_config(folder, "nowhere", checkpoint=nowhere)))
    other_form = run_config(
        folder,
        "other form",
        checkpoint=source,
        parallel=ParallelConfig(
            tensor_model_parallel_size=2, make_vocab_size_divisible_by=4, use_distributed_optimizer=True
        ),
    )
    found["other form"] = error_of(lambda: run(other_form))
    return found


def _relaid(folder: Path) -> dict[str, Any]:
    """The run that SIGTERM stopped at step 3, with two pipeline stages: saved as it was loaded, then continued."""
    from renio_megatron.megatron.checkpoint.checkpointer import MegatronCheckpointer
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    if _rank() == 0:
        source = folder / "terminated"
        shutil.copytree(source, folder / "relaid", ignore=shutil.ignore_patterns("finished.json"))
        (folder / "relaid" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3\n")
    _barrier()
    pipeline = ParallelConfig(pipeline_model_parallel_size=2, make_vocab_size_divisible_by=4)
    config = run_config(folder, "relaid", parallel=pipeline, train=train_config(micro_batch_size=2))
    layout = start(pipeline, seed=1)
    trainer = build_trainer(config, read_inputs(config), layout, folder / "relaid" / "checkpoints")
    assert trainer.resume() == 3
    MegatronCheckpointer(folder / "again", trainer.algorithm.learner).save(3, {})
    return run(config)


def _all(folder: Path) -> dict[str, Any]:
    """Everything in one launch of two ranks."""
    found: dict[str, Any] = {"sync": run(run_config(folder, "sync"))}
    for name, settings in {"async": {"async_save": True}, "kept": {"keep_last": 2}}.items():
        config = run_config(folder, name, checkpoint=CheckpointConfig(save_interval=2, **settings))
        found[name] = _asynchronous(config) if name == "async" else run(config)
    found["saved twice"] = _saved_twice(run_config(folder, "sync"))
    found["full"] = full_at_step_4(run_config(folder, "full"), rank=1, limit=2000)
    asynchronous = CheckpointConfig(save_interval=2, async_save=True)
    config = run_config(folder, "full async", checkpoint=asynchronous)
    found["full async"] = full_at_step_4(config, rank=1, limit=2000)
    config = run_config(folder, "terminated", checkpoint=asynchronous)
    if _rank() == 0:
        for name in (".iter_0000002.partial-dead", ".iter_0000001.deleted"):
            (Path(config.output_dir) / "checkpoints" / name).mkdir(parents=True)
        (Path(config.output_dir) / "config.yaml").write_text(to_yaml(config))
    _barrier()
    found["terminated"] = _sigterm(config)
    found["refused"] = _refused(folder)
    found["taken over"] = _taken_over(folder)
    found["relaid"] = _relaid(folder)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_models(folder)
    return folder, run_ranks(_all, 2, folder, timeout=400)


@pytest.mark.timeout(500)
def test_an_asynchronous_save_does_not_hold_training_up_nor_see_it(found: Any) -> None:
    folder, ranks = found
    for rank in ranks:
        in_force = rank["async"]["in force"]
        assert in_force[3] == (None, 1), "step 3 began while the checkpoint of step 2 was being written"
        assert in_force[4] == (None, 1), "nobody waited"
        assert in_force[5][0] == 2, "put in force by a later step, or by the save of step 4"
        assert same(rank["async"]["parameters"], rank["sync"]["parameters"])
    assert latest_step(folder / "async" / "checkpoints") == 5
    for step in ("iter_0000002", "iter_0000004", "iter_0000005"):
        saved = [tensors(folder / name / "checkpoints" / step, VOCAB_SIZE) for name in ("async", "sync")]
        assert same(*saved), f"{step} is the state of its step, not of the one when it was written"


def test_only_the_newest_are_kept(found: Any) -> None:
    folder = found[0]
    assert steps(folder / "sync" / "checkpoints") == [2, 4, 5]
    assert steps(folder / "kept" / "checkpoints") == [4, 5]
    for name in ("sync", "kept", "async", "terminated"):
        assert [path.name for path in (folder / name / "checkpoints").glob(".*")] == [], "nothing half-written stays"


def test_the_checkpoint_in_force_is_not_written_again(found: Any) -> None:
    for rank in found[1]:
        before, after = rank["saved twice"]
        assert before == after


@pytest.mark.parametrize("name", ["full", "full async"])
def test_a_full_disk_on_one_rank_is_named_and_the_older_checkpoint_serves(name: str, found: Any) -> None:
    folder, ranks = found
    for rank in ranks:
        assert rank[name]["message"].startswith("CheckpointError: the checkpoint of step 4 cannot be written to ")
        assert str(folder / name) in rank[name]["message"]
        assert rank[name]["left"] == (2, [2], [])
        assert rank[name]["again"]["outcome"] == "resumed"
        assert same(rank[name]["again"]["parameters"], rank["sync"]["parameters"])
    assert "rank 1: RuntimeError: Worker failure: " in ranks[0][name]["message"]
    # Newer versions of Megatron hand on the error's class and write the rest to stderr.
    assert re.search("File too large|<class '(OSError|RuntimeError)'>", ranks[0][name]["message"])


def test_sigterm_on_one_rank_saves_the_step_on_all_and_the_same_command_goes_on(found: Any) -> None:
    folder, ranks = found
    for rank in ranks:
        run_ = rank["terminated"]
        assert run_["outcome"] == "stopped by SIGTERM after step 3; the same command resumes it"
        assert run_["in force"] == 3
        assert run_["again"]["outcome"] == "resumed"
        assert same(run_["again"]["parameters"], rank["sync"]["parameters"])
    assert rows(folder, "terminated") == rows(folder, "sync")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated", ["__1_0.distcp has 100 bytes and should have", "is iter_0000004", "write 4 into"]),
        ("no index", [".metadata is missing", "is iter_0000004"]),
        ("no common", ["common.pt is truncated", "is iter_0000004"]),
        ("garbage", [".metadata cannot be parsed", "is iter_0000004"]),
        ("foreign", ["was written by another program"]),
        ("none", ["names the checkpoint '5', which is not beside it", "(2, 4)"]),
        ("blocked", ["cannot be written to", "checkpoints"]),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named(name: str, words: list[str], found: Any) -> None:
    for rank in found[1]:
        message = rank["refused"][name]
        assert message.startswith("CheckpointError")
        assert all(word in message for word in words), message


def test_a_run_takes_over_the_state_of_another(found: Any) -> None:
    folder, ranks = found
    for rank in ranks:
        assert rank["taken over"]["from step"]["outcome"] == "resumed"
        assert same(rank["taken over"]["from step"]["parameters"], rank["sync"]["parameters"])
        assert "holds no checkpoint" in rank["taken over"]["nowhere"]
        assert "parallel.use_distributed_optimizer: False there, True here" in rank["taken over"]["other form"]
        ((step, groups),) = rank["taken over"]["settings"]
        assert step == 6
        assert {beta2 for _, (_, beta2) in groups} == {0.5}, "the optimiser's settings are this run's"
    assert rows(folder, "from step") == [row for row in rows(folder, "sync") if row["step"] > 2]
    assert not (folder / "nowhere").exists()


def test_a_run_goes_on_in_another_layout(found: Any) -> None:
    folder, ranks = found
    assert [rank["relaid"]["outcome"] for rank in ranks] == ["resumed"] * 2
    assert "pipeline_model_parallel_size: 2" in (folder / "relaid" / "config.yaml").read_text()
    before, after = folder / "terminated" / "checkpoints" / "iter_0000003", folder / "again" / "iter_0000003"
    assert same(tensors(before, VOCAB_SIZE), tensors(after, VOCAB_SIZE)), "weights and optimiser, bit for bit"
    found_rows, expected = rows(folder, "relaid"), rows(folder, "sync")
    assert found_rows[:4] == expected[:4]
    for row, other in zip(found_rows[4:], expected[4:], strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    one, other = (tensors(folder / name / "checkpoints" / "iter_0000005", VOCAB_SIZE) for name in ("relaid", "sync"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5)
