"""The launcher of ranks: results come back, and every way to fail becomes a message in time."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.multiprocess import RankError, run_ranks

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
    ],
    ids=["raises", "hangs", "dies"],
)
def test_a_failing_rank_fails_the_launch_in_time(launch_seconds, function, hangs, message):
    timeout = 5.0 + 3.0 * launch_seconds if hangs else 240.0
    begin = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_ranks(function, 2, timeout=timeout)
    assert time.monotonic() - begin < (timeout + 10.0 if hangs else 120.0)
