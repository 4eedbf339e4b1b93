"""The launcher of ranks: results come back, and every way to fail becomes a message in time."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.helpers import multiprocess
from tests.helpers.multiprocess import RankError, Ranks, run_ranks

pytestmark = pytest.mark.alone


def sum_of_ranks(start):
    total = torch.tensor(float(start + dist.get_rank()))
    dist.all_reduce(total)
    return dist.get_rank(), total, os.environ["OMP_NUM_THREADS"], torch.get_num_threads()


def raise_on_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("the shoe does not fit")
    dist.barrier()


def hang_on_rank_1():
    if dist.get_rank() == 1:
        time.sleep(600)


def die_on_rank_1():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def leave_on_rank_1():
    if dist.get_rank() == 1:
        os._exit(0)
    dist.barrier()


def own_id():
    return os.getpid()


def start_a_helper():
    return subprocess.Popen(["sleep", "600"]).pid


def make_a_folder():
    return tempfile.mkdtemp()


def start_a_helper_and_raise(folder):
    (folder / str(dist.get_rank())).write_text(str(start_a_helper()))
    dist.barrier()
    raise ValueError("the shoe does not fit")


@pytest.fixture(scope="module")
def launch_seconds():
    """How long a launch takes on this machine now; limits follow from it."""
    run_ranks(sum_of_ranks, 2, 0)  # the imports, once for all launches
    begin = time.monotonic()
    assert run_ranks(sum_of_ranks, 2, 10) == [(0, torch.tensor(21.0), "1", 1), (1, torch.tensor(21.0), "1", 1)]
    return time.monotonic() - begin


def test_results_come_back_in_rank_order(launch_seconds):
    assert launch_seconds > 0  # the fixture compares the results


@pytest.mark.parametrize(
    ("function", "hangs", "message"),
    [
        (raise_on_rank_1, False, r"rank 1 of 2 raised[\s\S]*ValueError: the shoe does not fit"),
        (hang_on_rank_1, True, r"timeout: ranks \[0, 1\][\s\S]*rank 1 \(stack\)[\s\S]*hang_on_rank_1"),
        (die_on_rank_1, False, r"rank 1 of 2 was killed by SIGKILL"),
        (leave_on_rank_1, False, r"rank 1 of 2 exited with 0"),
    ],
    ids=["raises", "hangs", "dies", "leaves"],
)
def test_a_failing_rank_fails_the_launch_in_time(launch_seconds, function, hangs, message):
    timeout = 1.0 + 5.0 * launch_seconds if hangs else 240.0
    begin = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_ranks(function, 2, timeout=timeout)
    assert time.monotonic() - begin < (timeout + 10.0 if hangs else 120.0)


def test_ranks_stay_between_calls_and_leave_at_the_end():
    with Ranks(2) as ranks:
        assert [total for _, total, *_ in ranks(sum_of_ranks, 10)] == [torch.tensor(21.0)] * 2
        first = ranks(own_id)
        assert ranks(own_id) == first
        assert len({*first, os.getpid()}) == 3
    assert _have_ended(first)


def test_a_call_that_failed_is_followed_by_one_of_new_ranks():
    with Ranks(2) as ranks:
        first = ranks(own_id)
        with pytest.raises(RankError, match="the shoe does not fit"):
            ranks(raise_on_rank_1)
        assert _have_ended(first)
        assert not {*ranks(own_id)} & {*first}
        assert ranks(sum_of_ranks, 0)[1][1] == 1


def test_temporary_files_of_ranks_go_with_them():
    with Ranks(2) as ranks:
        folders = [Path(folder) for folder in ranks(make_a_folder)]
        assert all(folder.is_dir() for folder in folders)
    assert not any(folder.exists() for folder in folders)


def test_what_a_rank_has_started_ends_with_a_call_that_failed(tmp_path):
    with Ranks(2) as ranks, pytest.raises(RankError, match="the shoe does not fit"):
        ranks(start_a_helper_and_raise, tmp_path)
    helpers = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert _have_ended(helpers)


def test_ranks_with_many_threads_are_replaced(monkeypatch):
    with Ranks(2) as ranks:
        first = ranks(own_id)
        monkeypatch.setattr(multiprocess, "MANY_THREADS", 0)
        assert not {*ranks(own_id)} & {*first}
        assert _have_ended(first)


def test_after_a_call_that_hung_there_is_none(launch_seconds):
    with Ranks(2, timeout=1.0 + 5.0 * launch_seconds) as ranks:
        with pytest.raises(RankError, match="timeout"):
            ranks(hang_on_rank_1)
        begin = time.monotonic()
        with pytest.raises(RankError, match=r"own_id was not called: its ranks hung in .*hang_on_rank_1"):
            ranks(own_id)
        assert time.monotonic() - begin < 1.0


def _have_ended(processes):
    """Within seconds: a killed process is gone a moment later, or stays as an entry until its new parent looks."""
    end = time.monotonic() + 10.0
    while any(_is_alive(process) for process in processes):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _is_alive(process):
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
