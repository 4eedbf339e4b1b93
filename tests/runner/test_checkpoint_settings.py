"""What the settings of checkpoints promise before a run begins, and what a loop does that is asked to stop."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from renio_megatron.cli.worker import _guard
from renio_megatron.config import ParallelConfig
from renio_megatron.config.load import load_recipe
from renio_megatron.config.resume import CHANGEABLE, is_changeable
from renio_megatron.errors import CheckpointError, ConfigError, RunStopped
from renio_megatron.megatron.checkpoint.directory import new_partial, publish
from renio_megatron.runner.run_directory import RunDirectory
from tests.training.test_trainer import Checkpointer, trainer


@pytest.fixture
def recipe(tmp_path):
    def build(*overrides: str):
        path = tmp_path / "recipe.yaml"
        path.write_text("model: a\noutput_dir: b\n")
        return load_recipe("sft", path, overrides)

    return build


def test_settings_without_effect_are_refused(recipe):
    with pytest.raises(ConfigError, match=r"init is set but would be ignored: the weights come from checkpoint\.load"):
        recipe("init=random", "checkpoint.load=runs/a")
    with pytest.raises(ConfigError, match=r"checkpoint\.async_save is set but would be ignored: .*only the last step"):
        recipe("checkpoint.async_save=true", "checkpoint.save_interval=100", "train.train_iters=100")
    recipe("checkpoint.async_save=true", "checkpoint.save_interval=99", "train.train_iters=100")
    recipe("checkpoint.async_save=false", "checkpoint.save_interval=100", "train.train_iters=100")


@pytest.mark.parametrize("value", [0, -1])
def test_no_checkpoint_at_all_cannot_be_kept(recipe, value):
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_last must be above 0"):
        recipe(f"checkpoint.keep_last={value}")


def test_what_decides_the_result_is_not_changeable():
    for key in ("train.global_batch_size", "train.lr", "train.seed", "checkpoint.load", "data.seed", "train.bf16"):
        assert not is_changeable(key), key
    assert not is_changeable("parallel.use_distributed_optimizer"), "its state is written in another form"
    for key in ("parallel.context_parallel_size", "train.recompute_granularity", "rollout.micro_batch_size"):
        assert is_changeable(key), key
    layout = {f"parallel.{field.name}" for field in dataclasses.fields(ParallelConfig)}
    assert {key for key in layout if not is_changeable(key)} == {"parallel.use_distributed_optimizer"}
    assert all(CHANGEABLE.values()), "each with its reason"


def test_a_start_that_cannot_be_is_found_before_anything_is_written(recipe, tmp_path):
    root = tmp_path / "other" / "checkpoints"
    publish(new_partial(root, 5), root, 5, None)
    run = RunDirectory(tmp_path / "run")
    for load, train_iters, words in (
        (tmp_path / "other", 5, "nothing is left to do"),
        (root / "iter_0000005", 4, "nothing is left to do"),
        (root / "iter_0000004", 9, "holds no checkpoint"),
        (tmp_path, 9, "holds no checkpoint"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=words):
            run.state(recipe(f"checkpoint.load={load}", f"train.train_iters={train_iters}"), fresh=False)
    assert not run.path.exists()
    fine = recipe(f"checkpoint.load={root}", "train.train_iters=6")
    assert run.open(fine, fresh=False) == "new"
    (tmp_path / "other" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="--fresh moves aside"):
        RunDirectory(tmp_path / "other").state(recipe(f"checkpoint.load={root}", "train.train_iters=6"), fresh=True)


def test_a_run_that_has_its_own_checkpoint_needs_the_other_one_no_more(recipe, tmp_path):
    for name in ("other", "run"):
        root = tmp_path / name / "checkpoints"
        publish(new_partial(root, 5), root, 5, None)
    loading = recipe(f"checkpoint.load={tmp_path / 'other'}", "train.train_iters=9")
    (tmp_path / "new").mkdir()
    run = RunDirectory(tmp_path / "new")
    run.open(loading, fresh=False)
    (tmp_path / "run" / "checkpoints").rename(run.checkpoints)
    (tmp_path / "other").rename(tmp_path / "gone")
    assert run.open(loading, fresh=False) == "unfinished"


def test_a_loop_that_is_asked_to_stop_saves_that_step_and_no_other():
    asked: list[int] = []

    def stop_requested() -> bool:
        asked.append(run.step)
        return run.step == 3

    run = trainer(stop_requested=stop_requested)
    run.run()
    assert (run.stopped, run.step, asked) == (True, 3, [1, 2, 3])
    assert [step for step, _ in run.checkpointer.saved] == [2, 3]


def test_a_loop_that_is_asked_at_its_last_step_is_finished():
    run = trainer(stop_requested=lambda: run.step == 5)
    run.run()
    assert (run.stopped, run.step) == (False, 5)


def test_a_save_is_polled_after_each_step_and_waited_for_at_the_end():
    calls: list[str] = []
    checkpointer = Checkpointer()
    checkpointer.poll, checkpointer.finish = lambda: calls.append("poll"), lambda: calls.append("finish")
    trainer(checkpointer=checkpointer, train_iters=2).run()
    assert calls == ["poll", "poll", "finish"]


def test_a_checkpoint_of_another_kind_of_run_is_refused():
    run = trainer(checkpointer=Checkpointer((3, {"cursor": 12, "algorithm": {"weighting": None}})))
    with pytest.raises(CheckpointError, match=r"another kind of run.*\['weighting'\].*\['steps'\].*renio export"):
        run.resume()


def test_a_stopped_run_says_so_once_and_ends_with_143(capsys, monkeypatch):
    def stop():
        raise RunStopped(7)

    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert _guard(stop) == 143
    assert capsys.readouterr() == ("stopped by SIGTERM after step 7; the same command resumes it\n", "")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system call is Linux's")
def test_a_helper_process_ends_with_the_one_that_started_it():
    helper = (
        "import time; from renio_megatron.cli.launch import end_with_parent;"
        "end_with_parent(); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys;"
        f"child = subprocess.Popen([sys.executable, '-c', {helper!r}]); print(child.pid, flush=True); child.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = sorted(process.stdout.readline().strip() for _ in range(2))
    assert lines[1] == "up"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stat = Path(f"/proc/{lines[0]}/stat")
    end = time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.02)


def test_a_rank_whose_launcher_is_gone_already_ends_at_once():
    rank = "from renio_megatron.cli.launch import end_with_parent, launcher; end_with_parent(launcher()); print('up')"

    def code_and_words(launcher: str) -> tuple[int, str]:
        environment = {**os.environ, "RENIO_LAUNCHER_PID": launcher}
        done = subprocess.run(
            [sys.executable, "-c", rank], env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout

    assert code_and_words("1") == (128 + signal.SIGKILL, ""), "started by a process that another one has replaced"
    assert code_and_words(str(os.getpid())) == (0, "up\n")
    assert code_and_words("") == (0, "up\n"), "torchrun says nothing"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the signal mask of a process in /proc")
def test_a_helper_process_of_the_first_save_outlives_sigterm():
    code = (
        "import multiprocessing, os, signal\n"
        "from renio_megatron.megatron.checkpoint.held_signals import signals_held\n"
        "with signals_held():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('held', flush=True)\n"
        "    helper = multiprocessing.get_context('spawn').Manager()\n"  # as megatron-core starts its own
        "    print(open(f'/proc/{helper._process.pid}/status').read(), flush=True)\n"
        "    helper.shutdown()\n"
        "print('not reached', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM, "delivered at the end"
    held, *status = done.stdout.splitlines()
    assert (held, "not reached" in status) == ("held", False)
    (mask,) = (int(line.split()[1], 16) for line in status if line.startswith("SigBlk:"))
    assert mask >> (signal.SIGTERM - 1) & 1
