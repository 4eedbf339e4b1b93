"""Which device a rank takes; GPUs that are meant and cannot be used, or that two ranks share, are refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from renio_megatron.errors import ConfigError, Scope
from renio_megatron.parallel import devices
from renio_megatron.parallel.devices import backend_and_device, refuse_shared_gpus, unusable_gpus
from tests.helpers.multiprocess import Ranks

VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.fixture
def torch_of(monkeypatch):
    """Sets what torch and the driver say: CUDA's version, and the GPUs that the driver counts; none is usable."""

    def say(cuda: str | None, count: int = 0, files: int = 0) -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(devices, "num_gpus", lambda: count)
        monkeypatch.setattr(devices, "_num_device_files", lambda: files)

    return say


@pytest.mark.parametrize(
    ("cuda", "environment", "count", "files"),
    [
        (None, {}, 0, 0),
        (None, {}, 8, 8),  # a torch for the CPU on a machine with GPUs: chosen
        ("13.0", {}, 0, 0),  # a torch with CUDA on a laptop without a GPU
        ("13.0", {VISIBLE: ""}, 8, 8),
        ("13.0", {VISIBLE: "-1"}, 8, 8),
        (None, {VISIBLE: " "}, 0, 0),
    ],
)
def test_where_no_gpu_is_meant_the_cpu_serves(torch_of, monkeypatch, cuda, environment, count, files):
    torch_of(cuda, count, files)
    assert unusable_gpus(environment) is None
    monkeypatch.delenv(VISIBLE, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert backend_and_device(3) == ("gloo", torch.device("cpu"))


@pytest.mark.parametrize(
    ("cuda", "environment", "count", "files", "words"),
    [
        (None, {VISIBLE: "0"}, 0, 0, "CUDA_VISIBLE_DEVICES=0 names a GPU, and this torch .* is built without CUDA"),
        (None, {VISIBLE: "GPU-8a"}, 8, 8, "CUDA_VISIBLE_DEVICES=GPU-8a names a GPU, and this torch"),
        ("13.0", {VISIBLE: "0,1"}, 0, 0, "names a GPU, and CUDA finds none that it can use"),
        ("13.0", {}, 8, 8, "this machine has 8 GPUs, and CUDA finds none that it can use"),
        ("13.0", {}, 0, 1, "this machine has 1 GPU, and CUDA finds none that it can use"),
    ],
)
def test_gpus_that_are_meant_and_cannot_be_used(torch_of, monkeypatch, cuda, environment, count, files, words):
    torch_of(cuda, count, files)
    monkeypatch.delenv(VISIBLE, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{words}.*or set device=cpu, to run on the CPU") as caught:
        backend_and_device(0)
    assert caught.value.scope is Scope.ALL_RANKS


def test_two_ranks_with_one_gpu_are_refused_on_both(two_ranks: Ranks):
    own, shared, alone = zip(*two_ranks(_exchanged), strict=True)
    assert own == alone == ("", "")
    assert shared[0] == shared[1]
    assert shared[0].startswith("ranks 0 and 1 have the same GPU (GPU-7): a node has more ranks than GPUs")
    assert "--nproc-per-node" in shared[0] and "device=cpu" in shared[0]


def _exchanged() -> list[str]:
    """What this rank is told where each has its own GPU, where both have one, and where they have none."""
    rank, told = dist.get_rank(), []
    for case, identity in enumerate((f"GPU-{rank}", "GPU-7", "")):
        store = dist.PrefixStore(f"case {case}", dist.distributed_c10d._get_default_store())
        told.append("")
        try:
            refuse_shared_gpus(store, rank, 2, identity)
        except ConfigError as error:
            told[-1] = str(error)
    return told
