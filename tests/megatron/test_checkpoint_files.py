"""The directory of checkpoints as files: whatever moment a job dies at, the tracker names a whole checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from renio_megatron.errors import CheckpointError, RunStopped
from renio_megatron.files import JsonLines, write_atomically
from renio_megatron.megatron.checkpoint.directory import (
    TRACKER,
    adopt,
    damage,
    find_checkpoint,
    latest_step,
    new_partial,
    older_whole,
    publish,
    remove_leftovers,
    steps,
)
from renio_megatron.parallel.stopping import StopRequest
from renio_megatron.runner import signals
from renio_megatron.runner.signals import StopSignal
from renio_megatron.training.metrics.sinks import JsonlSink, read_metrics
from renio_megatron.training.rollout_log import RolloutSink
from renio_megatron.types import Prompt, Rollout


class Died(BaseException):
    """The process ended here."""


def _save(root, step, keep_last=None):
    partial = new_partial(root, step)
    for name in ("metadata.json", ".metadata", "common.pt"):
        (partial / name).write_text(str(step))
    publish(partial, root, step, keep_last)


def _die_at(monkeypatch, number):
    """The process dies before its `number`-th change of names, and in the middle of a deletion."""
    count = 0
    rename, replace, rmtree, fsync = os.rename, os.replace, shutil.rmtree, os.fsync

    def dying(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                raise Died
            return real(*args, **kwargs)

        return call

    def rmtree_by_halves(path, **kwargs):
        nonlocal count
        count += path.is_dir()
        if count == number and path.is_dir():
            sorted(path.iterdir())[0].unlink()
            raise Died
        rmtree(path, **kwargs)

    monkeypatch.setattr(os, "rename", dying(rename))
    monkeypatch.setattr(os, "replace", dying(replace))
    monkeypatch.setattr(os, "fsync", dying(fsync))
    monkeypatch.setattr(shutil, "rmtree", rmtree_by_halves)


def _whole(root, step):
    directory = root / f"iter_{step:07d}"
    return sorted((path.name, path.read_text()) for path in directory.iterdir()) == [
        (".metadata", str(step)),
        ("common.pt", str(step)),
        ("metadata.json", str(step)),
    ]


def test_at_every_moment_of_a_save_every_named_checkpoint_is_whole(tmp_path, monkeypatch):
    for number in range(1, 100):
        root = tmp_path / str(number)
        _save(root, 2)
        _save(root, 4)
        (root / TRACKER).write_text("2\n")  # set back by hand: the save of step 4 replaces one that is there
        with monkeypatch.context() as patch:
            _die_at(patch, number)
            try:
                _save(root, 4, keep_last=1)
                break
            except Died:
                pass
        assert latest_step(root) in (2, 4)
        assert all(_whole(root, step) for step in steps(root)), "what is left of a deletion has not the old name"
        remove_leftovers(root)
        assert not list(root.glob(".iter*"))
    else:
        raise AssertionError("never came to an end")
    assert number > 10, "there were moments to die at"
    assert (latest_step(root), steps(root)) == (4, [4])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the names of open files in /proc")
def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    events = []
    rename, replace = os.rename, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(Path(f"/proc/self/fd/{file}").readlink().name))
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append(f"-> {paths[1].name}"), rename(*paths)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append(f"-> {Path(paths[1]).name}"), replace(*paths)))
    _save(tmp_path, 4)
    assert sorted(events[:3]) == [".metadata", "common.pt", "metadata.json"]
    assert events[3].startswith(".iter_0000004.partial-")
    assert events[4:] == ["-> iter_0000004", tmp_path.name, f".{TRACKER}.tmp", f"-> {TRACKER}", tmp_path.name]


def test_keep_last_counts_those_up_to_the_one_in_force(tmp_path):
    for step in (2, 4, 6, 8):
        _save(tmp_path, step)
    (tmp_path / TRACKER).write_text("4\n")
    _save(tmp_path, 5, keep_last=2)
    assert steps(tmp_path) == [4, 5, 6, 8]


def test_a_failed_deletion_is_a_warning(tmp_path, monkeypatch, caplog):
    _save(tmp_path, 2)

    def refuse(directory):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr("renio_megatron.megatron.checkpoint.directory.remove_directory", refuse)
    _save(tmp_path, 4, keep_last=1)
    assert latest_step(tmp_path) == 4
    assert "iter_0000002 cannot be deleted: Device or resource busy" in caplog.text


def test_partial_and_deleted_directories_are_no_checkpoints(tmp_path):
    assert latest_step(tmp_path) is None
    for name in (".iter_0000002.partial-1", ".iter_0000003.deleted", "iter_x", "iter_0000009.bak"):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == []
    assert new_partial(tmp_path, 2) != new_partial(tmp_path, 2), "an orphaned writer cannot share it"
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000009.bak", "iter_x"]


def test_without_a_tracker_the_newest_is_in_force_and_named_again(tmp_path, caplog):
    _save(tmp_path, 2)
    _save(tmp_path, 4)
    adopt(tmp_path, 4)
    assert caplog.text == ""
    (tmp_path / TRACKER).unlink()
    assert latest_step(tmp_path) == 4
    assert find_checkpoint(tmp_path).name == "iter_0000004"
    adopt(tmp_path, 4)
    assert (tmp_path / TRACKER).read_text() == "4\n"
    assert "is missing; resuming from the newest checkpoint next to it, step 4" in caplog.text


def test_a_job_that_dies_before_its_first_checkpoint_is_named_goes_on_from_it(tmp_path, monkeypatch):
    def die(*_):
        raise Died

    monkeypatch.setattr("renio_megatron.megatron.checkpoint.directory.write_atomically", die)
    with pytest.raises(Died):
        _save(tmp_path, 2)
    assert latest_step(tmp_path) == 2
    assert _whole(tmp_path, 2)


@pytest.mark.parametrize("text", ["", "7", "x", "4\n2", "release"])
def test_a_tracker_that_names_nothing_lists_what_is_there(tmp_path, text):
    _save(tmp_path, 4)
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match=r"latest_checkpointed_iteration\.txt names .*\(4\)"):
        latest_step(tmp_path)


def test_a_checkpoint_is_found_from_three_places(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    _save(root, 2)
    _save(root, 4)
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(root) == root / "iter_0000004"
    assert find_checkpoint(root / "iter_0000002") == root / "iter_0000002"
    for path in (tmp_path, tmp_path / "missing", root / "iter_0000003"):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            find_checkpoint(path)


def test_where_no_older_checkpoint_is_whole_none_is_named(tmp_path):
    _save(tmp_path, 2)
    _save(tmp_path, 4)
    assert older_whole(tmp_path / "iter_0000004") is None, "step 2 has no tensors"


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_rows_are_whole_and_single_where_a_job_dies_while_it_purges(tmp_path, monkeypatch, call):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(6):
        sink.write(step, {"loss": float(step)})
    with monkeypatch.context() as patch:
        patch.setattr(os, call, lambda *args: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            JsonlSink(sink.path, purge_step=4)
    assert [row["step"] for row in read_metrics(sink.path)] == [0, 1, 2, 3, 4, 5]
    JsonlSink(sink.path, purge_step=4).write(4, {"loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(sink.path)] == [*((k, k) for k in range(4)), (4, 9.0)]


def test_a_row_is_on_the_disk_when_it_is_appended(tmp_path, monkeypatch):
    lines = JsonLines(tmp_path / "lines.jsonl")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    lines.append([{"step": 1}])
    assert synced == [len('{"step": 1}\n')]


def test_rollouts_are_a_line_each_and_purged_by_step(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    sink = RolloutSink(path)
    drawn = [Rollout(Prompt(7, (1,), (1,)), (3, 4)), Rollout(Prompt(8, (1,), (1,)), (5,), finished=False)]
    for step in (1, 2):
        sink.write(step, drawn, [0.5, 1.5])
    with path.open("a") as file:
        file.write('{"step": 3, "prompt": 9')
    sink = RolloutSink(path, purge_step=2)
    with pytest.raises(ValueError, match="argument"):
        sink.write(2, drawn, [1.0])
    sink.write(2, drawn[:1], [2.0])
    sink.close()
    assert path.read_text().splitlines() == [
        '{"step": 1, "prompt": 7, "completion_ids": [3, 4], "weight": 0.5, "finished": true}',
        '{"step": 1, "prompt": 8, "completion_ids": [5], "weight": 1.5, "finished": false}',
        '{"step": 2, "prompt": 7, "completion_ids": [3, 4], "weight": 2.0, "finished": true}',
    ]


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_is_noted_once_and_its_echo_is_none(monkeypatch, number, name):
    deaths, said = [], []
    monkeypatch.setattr(signals, "_die", deaths.append)
    before, request = signal.getsignal(number), StopRequest()
    with StopSignal(request, said.append):
        assert request.number is None
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        assert (request.number, deaths) == (number, [])
        monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.001)
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert deaths == [number], "a second request ends the process"
    assert signal.getsignal(number) == before
    assert len(said) == 1 and said[0].startswith(f"stopping ({name}): ")
    assert "renio stop" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("error", "dies"), [(RuntimeError("peer"), True), (CheckpointError("full"), False), (RunStopped(3), False)]
)
def test_after_sigterm_a_lost_peer_is_no_news_but_an_error_of_ours_is(monkeypatch, error, dies):
    deaths = []
    monkeypatch.setattr(signals, "_die", lambda number: deaths.append(1))
    with pytest.raises(type(error)), StopSignal(StopRequest()):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        raise error
    assert deaths == [1] * dies
    with pytest.raises(RuntimeError), StopSignal(StopRequest()):
        raise RuntimeError
    assert deaths == [1] * dies, "without a signal it is news"


@pytest.mark.filterwarnings("ignore")
def test_what_a_checkpoint_holds_once_may_stand_with_its_tensors(tmp_path):
    import torch.distributed.checkpoint as dcp

    for name, complaint in (("common_state/shard_0_1", None), ("other/shard_0_1", "common.pt is missing")):
        directory = tmp_path / name.partition("/")[0]
        dcp.save({name: {"step": 1}}, checkpoint_id=directory, no_dist=True)
        (directory / "metadata.json").write_text("{}")
        assert damage(directory) == complaint
