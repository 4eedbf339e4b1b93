"""Which variables a GPU's generation and a layout ask for."""

from __future__ import annotations

import pytest

from renio_megatron.parallel import nvml
from renio_megatron.parallel.nvml import compute_capability, num_gpus
from renio_megatron.runner.device_env import hardware_variables, set_variables

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("capability", "tensor", "context", "fsdp", "expected"),
    [
        (None, 2, 2, False, {}),
        ((8, 0), 1, 1, False, {}),
        ((8, 0), 2, 1, False, {CONNECTIONS: "1"}),
        ((9, 0), 1, 1, False, {}),
        ((9, 0), 2, 1, False, {CONNECTIONS: "1"}),
        ((9, 0), 1, 2, False, {CONNECTIONS: "1"}),
        ((9, 0), 2, 1, True, {CONNECTIONS: None}),
        ((10, 0), 2, 2, False, {}),
        ((12, 0), 8, 1, False, {}),
        ((10, 0), 1, 1, True, {CONNECTIONS: None}),
    ],
)
def test_one_hardware_queue_only_before_blackwell_and_without_fsdp(capability, tensor, context, fsdp, expected):
    found = hardware_variables(capability, tensor_size=tensor, context_size=context, uses_fsdp=fsdp)
    assert {variable.name: variable.value for variable in found} == expected
    assert all(variable.reason for variable in found)


@pytest.mark.parametrize(("capability", "names"), [((9, 0), ["NCCL_ALGO"]), ((10, 0), ["NCCL_ALGO"]), (None, [])])
def test_a_deterministic_run_keeps_its_sums_out_of_the_switches(capability, names):
    found = hardware_variables(capability, tensor_size=1, context_size=1, is_deterministic=True)
    assert [variable.name for variable in found] == names


def test_what_the_user_has_set_stays_and_a_contradiction_is_said():
    one = hardware_variables((9, 0), tensor_size=2, context_size=1)
    for mine, after, warnings in (({}, "1", 0), ({CONNECTIONS: "1"}, "1", 0), ({CONNECTIONS: "8"}, "8", 1)):
        assert len(set_variables(one, mine)) == warnings
        assert mine == {CONNECTIONS: after}
    many = hardware_variables((9, 0), tensor_size=2, context_size=1, uses_fsdp=True)
    for mine, warnings in (({}, 0), ({CONNECTIONS: "1"}, 1), ({CONNECTIONS: "32"}, 0)):
        before = dict(mine)
        assert len(set_variables(many, mine)) == warnings
        assert mine == before


class Nvml:
    """Stands in for the driver's library; `failing` names the call that returns an error."""

    def __init__(self, failing=None):
        self.failing, self.is_open = failing, False

    def nvmlInit_v2(self):
        self.is_open = self.failing != "init"
        return int(not self.is_open)

    def nvmlShutdown(self):
        self.is_open = False

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 4
        return int(self.failing == "count")

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        return int(self.failing == "handle")

    def nvmlDeviceGetCudaComputeCapability(self, device, major, minor):
        major._obj.value, minor._obj.value = 9, 0
        return int(self.failing == "capability")


@pytest.mark.parametrize(
    ("failing", "expected"), [(None, (9, 0)), ("init", None), ("handle", None), ("capability", None)]
)
def test_the_driver_is_asked(monkeypatch, failing, expected):
    library = Nvml(failing)
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: library)
    assert compute_capability() == expected
    assert not library.is_open


@pytest.mark.parametrize(("failing", "expected"), [(None, 4), ("init", 0), ("count", 0)])
def test_gpus_are_counted(monkeypatch, failing, expected):
    library = Nvml(failing)
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: library)
    assert num_gpus() == expected
    assert not library.is_open


def test_without_a_driver_there_is_no_gpu(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(nvml.ctypes, "CDLL", missing)
    assert compute_capability() is None
    assert num_gpus() == 0


@pytest.mark.gpu
def test_the_capability_agrees_with_torch():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert compute_capability() == torch.cuda.get_device_capability(0)
