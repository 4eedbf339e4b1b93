"""The Triton kernels: in the interpreter, on a GPU where there is one, and which calls reach them.

The cases are `triton_cases`, against fp64. The interpreter runs them in a process of its own, once for the whole file.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest
import torch
import torch.distributed as dist

from renio_megatron.errors import ConfigError
from renio_megatron.losses import kernels
from renio_megatron.losses.kernels import torch_ops
from renio_megatron.objective.divergences import DIVERGENCES, Divergence, forward_kl
from tests.helpers.measured import within_limits
from tests.helpers.multiprocess import Ranks, run_ranks
from tests.helpers.paths import ROOT
from tests.helpers.vectors import load_cases
from tests.losses import triton_cases
from tests.losses.test_loss_sharded import measure

triton = pytest.importorskip("triton", reason="triton is not installed")


def version_of(package):
    return tuple(int(part) for part in package.__version__.split(".")[:2])


INTERPRETED = {"TRITON_INTERPRET": "1", "RENIO_KERNELS": "triton"}
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
has_interpreter = pytest.mark.skipif(
    version_of(triton) == (3, 6) and version_of(numpy) >= (2, 4),
    reason="Triton 3.6's interpreter needs numpy < 2.4, which turns arrays of one dimension and one entry into numbers",
)
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def interpreter():
    """A process for the interpreted kernels, which starts with the environment of its first call."""
    with Ranks(1, timeout=1200, fresh=True) as ranks:
        yield ranks


@pytest.fixture
def interpreting(monkeypatch):
    """The environment in which kernels are interpreted, for processes that start in one test."""
    for name, value in INTERPRETED.items():
        monkeypatch.setenv(name, value)


def group(name):
    """What a group of cases measures."""
    return list(triton_cases.GROUPS[name]())


@has_interpreter
@pytest.mark.matrix(4)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", triton_cases.GROUPS)
def test_in_the_interpreter(name, interpreting, interpreter):
    [measured] = interpreter(group, name)
    within_limits(measured)


def on_ranks():
    """On a rank: a divergence in one round and one in two, over uneven shards."""
    cases = [load_cases()[number] for number in (0, 3, 6)]
    return [found for case in cases for found in measure(case, torch.float32, tensor=dist.group.WORLD)]


@has_interpreter
def test_two_tensor_ranks_in_the_interpreter(interpreting):
    for measured in run_ranks(on_ranks, 2, fresh=True):
        within_limits(measured)


def call(dtype=torch.float32, divergence=None):
    """The dispatched function with the fewest arguments, on two rows."""
    logits = torch.zeros(2, 3, dtype=dtype)
    if divergence is None:
        return kernels.token_statistics(logits, torch.zeros(2, dtype=torch.int64), num_valid=3, temperature=1.0)
    normalizers = [torch.zeros(2)] * 4
    return kernels.clamped_sums(logits, logits, normalizers, divergence, num_valid=3, temperature=1.0)


def test_the_choice_by_environment(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("RENIO_KERNELS", "torch")
    assert call().dtype == torch.float32
    monkeypatch.setenv("RENIO_KERNELS", "cuda")
    with pytest.raises(ConfigError, match="must be torch or triton, or unset; got 'cuda'"):
        call()
    monkeypatch.setenv("RENIO_KERNELS", "triton")
    with pytest.raises(ConfigError, match="on cpu; outside CUDA they need TRITON_INTERPRET=1"):
        call()
    monkeypatch.setattr(kernels, "_triton_ops", lambda: None)
    with pytest.raises(ConfigError, match="triton is not installed"):
        call()


def test_what_the_kernels_cannot_take(monkeypatch):
    from renio_megatron.losses.kernels import triton_ops, triton_terms

    monkeypatch.setattr(triton_terms, "IS_INTERPRETED", True)
    monkeypatch.setenv("RENIO_KERNELS", "triton")
    with pytest.raises(ConfigError, match=r"float64; they take float32, bfloat16 and float16"):
        call(torch.float64)
    with pytest.raises(ConfigError, match="has no form in triton_ops"):
        call(divergence=Divergence(lambda student, teacher, beta: (student, teacher)))
    apart = torch.zeros(4, 3).T
    assert "4 entries apart" not in str(triton_ops.obstacle([apart[:, :1]], []))
    assert "3 entries apart" in triton_ops.obstacle([apart], [])
    assert triton_ops.obstacle([torch.zeros(3, 4)], list(DIVERGENCES.values())) is None


def test_tensors_on_cuda_choose_the_kernels(monkeypatch):
    """Without a GPU: what is chosen for tensors that say they are on one."""
    from renio_megatron.losses.kernels import triton_ops

    class OnCuda(torch.Tensor):
        device = CUDA

    monkeypatch.delenv("RENIO_KERNELS", raising=False)
    here, there = torch.zeros(2, 3), torch.zeros(2, 3).as_subclass(OnCuda)
    own = Divergence(lambda student, teacher, beta: (student, teacher))
    same = Divergence(forward_kl.terms)
    for arguments, expected in (
        ((there, there), triton_ops),
        ((there, there, same), triton_ops),
        ((there, there, own), torch_ops),
        ((there.double().as_subclass(OnCuda), there), torch_ops),
        ((here, here), torch_ops),
        ((there, here), torch_ops),
    ):
        assert kernels._implementation(arguments) is expected
    monkeypatch.setattr(kernels, "_triton_ops", lambda: None)
    assert kernels._implementation((there, there)) is torch_ops


def test_the_cpu_does_not_import_triton():
    script = (
        "import sys, torch\nfrom renio_megatron import distillation_loss\nbefore = 'triton' in sys.modules\n"
        "logits, ids = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, dtype=torch.int64)\n"
        "distillation_loss(logits, logits.detach(), ids, ids, 1).loss.backward()\n"
        "print(before or 'triton' not in sys.modules, 'renio_megatron.losses.kernels.triton_ops' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in INTERPRETED}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]


def test_a_row_is_covered_by_its_parts():
    from renio_megatron.losses.kernels.tuning import CANDIDATES, cut_rows

    for rows in (1, 2, 5, 40, 3000):
        for width in (1, 31, 32, 33, 151936):
            for block in (32, *(launch.block for launch in CANDIDATES)):
                parts, blocks = cut_rows(rows, width, block, CPU)
                assert parts * blocks * block >= width > (parts - 1) * blocks * block
    assert cut_rows(1, 1024, 32, CPU)[0] > 1 == cut_rows(3000, 1024, 32, CPU)[0]


@pytest.fixture
def tuner(monkeypatch):
    """`tuning` on a machine whose clock says that the largest block is the fastest; nothing chosen yet."""
    from renio_megatron.losses.kernels import tuning

    timed = []
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: -run.args[0].block + (timed.append(run.args) or 0))
    return tuning, timed


def test_a_cut_is_timed_once_for_large_calls(tuner):
    tuning, timed = tuner
    arguments = ("kernel", 8192, 151936, CUDA, print)
    assert tuning.choose_launch("kernel", 1, 151936, CUDA, None) == tuning.FIXED and not timed, "too small to time"
    chosen = tuning.choose_launch(*arguments)
    assert chosen.block == max(launch.block for launch in tuning.CANDIDATES)
    assert [launch for launch, _ in timed] == list(tuning.CANDIDATES) and {few for _, few in timed} == {442}
    assert tuning.choose_launch(*arguments) == chosen == tuning.choose_launch("kernel", 1, 151936, CUDA, None)
    assert len(timed) == len(tuning.CANDIDATES)
    assert tuning.choose_launch("kernel", 8192, 151936, CPU, None) == tuning.INTERPRETER_LAUNCH


def test_nothing_is_timed_where_bits_must_repeat(tuner, monkeypatch):
    tuning, timed = tuner
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert tuning.choose_launch("kernel", 8192, 151936, CUDA, None) == tuning.FIXED
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.choose_launch("kernel", 8192, 151936, CUDA, None) == tuning.FIXED and not timed


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("name", triton_cases.GROUPS)
def test_on_the_gpu(name, monkeypatch):
    monkeypatch.setenv("RENIO_KERNELS", "triton")
    within_limits(list(triton_cases.GROUPS[name]()))


@pytest.mark.gpu
@no_gpu
def test_beyond_32_bits_of_entries_with_timed_cuts(monkeypatch):
    from renio_megatron.losses.kernels import tuning

    if torch.cuda.mem_get_info()[0] < triton_cases.FREE_BYTES:
        pytest.skip("needs 20 GB of free device memory")
    monkeypatch.setenv("RENIO_KERNELS", "triton")
    monkeypatch.setattr(tuning, "_fastest", {})
    within_limits(list(triton_cases.beyond_32_bits()))
