"""Groups that share one device: as many threads that wake as with one group, and collectives as before."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.multiprocess import Ranks
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads under /proc")


def _loops() -> int:
    return sum((task / "comm").read_text().startswith("gloo_tcp") for task in Path("/proc/self/task").iterdir())


def _many_groups() -> tuple[int, int, list[float], list[float]]:
    before = _loops()
    groups = [dist.new_group(range(dist.get_world_size()), timeout=timedelta(seconds=70 + i)) for i in range(8)]
    found, timeouts = [], []
    for number, group in enumerate(groups):
        value = torch.tensor([float(dist.get_rank() + 10 * number)])
        dist.all_reduce(value, group=group)
        found.append(value.item())
        timeouts.append(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
    # Interleaved on several groups at once, and one that torch gives to gloo's own class only.
    values = [torch.ones(1000) * number for number in range(8)]
    works = [dist.all_reduce(value, group=group, async_op=True) for value, group in zip(values, groups, strict=True)]
    for work in reversed(works):
        work.wait()
    found += [value[0].item() for value in values]
    dist.monitored_barrier(groups[3], timeout=timedelta(seconds=60))
    return before, _loops(), found, timeouts


def test_interfaces_are_those_of_the_environment() -> None:
    """One device for each, and a name that there is not is refused, as torch refuses it."""
    code = (
        "import torch.distributed as dist; from renio_megatron.parallel.gloo import share_gloo_device;"
        "share_gloo_device(); dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1);"
        "from tests.parallel.test_gloo import _loops; print(_loops())"
    )

    def run(names: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": names}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100, check=False
        )

    for names, expected in (("", "1\n"), ("lo", "1\n"), ("lo,lo", "2\n")):
        done = run(names)
        assert (done.returncode, done.stdout) == (0, expected), done.stderr
    done = run("none0")
    assert done.returncode != 0 and "none0" in done.stderr


def test_groups_share_one_thread_that_wakes() -> None:
    with Ranks(2) as ranks:
        for before, after, found, timeouts in ranks(_many_groups):
            assert before == after == 1
            assert found == [1.0 + 20.0 * number for number in range(8)] + [2.0 * number for number in range(8)]
            assert timeouts == [70.0 + number for number in range(8)]
