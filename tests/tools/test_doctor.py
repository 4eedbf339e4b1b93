"""The doctor finds nothing where all is well, and what is wrong where something is."""

from __future__ import annotations

import functools
import os

import pytest
import torch

from renio_megatron.cli.doctor import read_settings
from renio_megatron.cli.main import main
from renio_megatron.errors import ConfigError
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.tools import doctor
from renio_megatron.tools.doctor import (
    bandwidth_verdict,
    check_linear_loss,
    check_loss,
    check_world,
    examine,
    loss_verdict,
)
from tests.helpers.multiprocess import run_ranks

LAYOUTS = {  # name: (tensor, pipeline, context)
    "TP 4": (4, 1, 1),
    "TP 2 x CP 2": (2, 1, 2),
    "TP 2 x DP 2": (2, 1, 1),
    "CP 2 x DP 2": (1, 1, 2),
    "PP 2 x DP 2": (1, 2, 1),
}


def _layouts():
    from renio_megatron.config import ParallelConfig
    from renio_megatron.megatron.runtime.initialize import start

    doctor.SIZES["gloo"] = (1 << 16,)
    found = {}
    for name, (tensor, pipeline, context) in LAYOUTS.items():
        parallel = ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
        )
        layout = start(parallel, seed=1)
        for dtype in (torch.float32, torch.bfloat16):
            found[name, dtype] = [(verdict.is_good, str(verdict)) for verdict in examine(layout, dtype=dtype)]
    warned = ["NCCL_ALGO is odd"] if layout.rank == 3 else []
    found["environment"] = [str(verdict) for verdict in examine(layout, dtype=torch.float32, warnings=warned)]
    found["versions"] = _with_other_versions(layout)
    found["sum"] = _with_a_missing_sum(layout)
    return found


def _with_other_versions(layout):
    from renio_megatron.runner import environment

    own = environment.versions
    environment.versions = (lambda: "torch 1") if layout.rank == 2 else own
    try:
        return [str(verdict) for verdict in check_world(layout) if not verdict.is_good]
    finally:
        environment.versions = own


def _with_a_missing_sum(layout):
    """A loss whose context ranks forget to add up their pieces of a sequence, seen by the check."""
    losses = {name: getattr(doctor, name) for name in ("distillation_loss", "linear_distillation_loss")}
    for name, own in losses.items():
        setattr(doctor, name, functools.partial(_without_the_sum, own))
    context = ParallelLayout(
        rank=layout.rank, world_size=4, context=layout.data, pipeline=layout.pipeline, device=torch.device("cpu")
    )
    try:
        checks = (check_loss, check_linear_loss)
        return [str(check(context, "JSD", 0.5, torch.float32)) for check in checks]
    finally:
        for name, own in losses.items():
            setattr(doctor, name, own)


def _without_the_sum(loss, *args, sequence_group, **kwargs):
    return loss(*args, sequence_group=None, **kwargs)


@pytest.fixture(scope="module")
def found():
    ranks = run_ranks(_layouts, 4, timeout=240.0)
    assert ranks[0] == ranks[3], "the verdicts are the same on every rank"
    return ranks[0]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_all_is_good_in_every_layout_and_precision(found):
    for case in ((name, dtype) for name in LAYOUTS for dtype in (torch.float32, torch.bfloat16)):
        assert [line for is_good, line in found[case] if not is_good] == [], case
        assert sum("  loss, " in line for _, line in found[case]) == 3
        assert sum("  linear loss, " in line for _, line in found[case]) == 3
    assert any("tensor all-reduce        64 KiB" in line for _, line in found["TP 4", torch.float32])


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_what_is_wrong_on_one_rank_is_said(found):
    assert found["environment"][0] == "FAIL  environment              NCCL_ALGO is odd"
    (line,) = found["versions"]
    assert line.startswith("FAIL  versions")
    assert "rank 2 on " in line
    assert "has torch 1, rank 0 has renio" in line
    assert [line[:18] for line in found["sum"]] == ["FAIL  loss, JSD   ", "FAIL  linear loss,"]


def test_one_process_alone_is_examined(monkeypatch):
    verdicts = list(examine(ParallelLayout(), dtype=torch.float32))
    assert all(verdict.is_good for verdict in verdicts)
    divergences = ("forward KL", "JSD", "reverse KL")
    assert [verdict.what for verdict in verdicts[-6:]] == [
        f"{loss}, {divergence}" for divergence in divergences for loss in ("loss", "linear loss")
    ]
    monkeypatch.setattr(doctor, "device_identity", lambda device: "GPU-1")
    monkeypatch.setattr(doctor, "gather_objects", lambda mine: [mine, mine])
    shared = list(check_world(ParallelLayout()))[1]
    assert not shared.is_good
    assert "ranks 0 and 1 share a GPU" in shared.found


@pytest.mark.parametrize("which", ["logits", "hidden states", "head"])
def test_a_wrong_gradient_with_the_right_value_is_seen(monkeypatch, which):
    name, check = (
        ("distillation_loss", check_loss) if which == "logits" else ("linear_distillation_loss", check_linear_loss)
    )
    own = getattr(doctor, name)

    def wrong(*args, **kwargs):
        args[which == "head"].register_hook(lambda gradient: 1.01 * gradient)
        return own(*args, **kwargs)

    monkeypatch.setattr(doctor, name, wrong)
    verdict = check(ParallelLayout(), "JSD", 0.5, torch.float32)
    assert not verdict.is_good
    assert "gradient 1.0e-02" in verdict.found


@pytest.mark.parametrize("errors", [[float("nan"), 0.0, 0.0], [0.0, float("nan"), 0.0], [0.0, 0.0, 1.0]])
def test_a_loss_that_is_off_or_no_number_is_not_good(errors):
    assert not loss_verdict("JSD", torch.bfloat16, errors).is_good


def test_speed_is_judged_over_nccl_alone():
    assert bandwidth_verdict("data", "", [100.0, 10.0], "gloo").is_good
    assert bandwidth_verdict("data", "", [100.0, 60.0], "nccl").is_good
    slow = bandwidth_verdict("data", "", [100.0, 10.0], "nccl")
    assert "the group of rank 1 is slower" in slow.found


def test_settings_come_from_a_recipe_or_alone(tmp_path):
    alone = read_settings(None, ["parallel.tensor_model_parallel_size=2", "bf16=true"])
    assert (alone.parallel.tensor_model_parallel_size, alone.bf16) == (2, True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: modchain/student\nteacher: {model: modchain/teacher}\noutput_dir: run\n")
    given = read_settings(str(recipe), ["parallel.context_parallel_size=2", "train.bf16=true"])
    assert (given.parallel.context_parallel_size, given.bf16) == (2, True)
    with pytest.raises(ConfigError, match=r"train\.bf16"):
        read_settings(None, ["train.bf16=true"])


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_command_starts_its_own_ranks_and_its_exit_code_is_the_verdict(capfd, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor", "bf16=false", "--nproc", "2", "parallel.tensor_model_parallel_size=2"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0].startswith("world of 2 ranks on 1 node, TP 2")
    assert all(line.startswith("ok ") for line in said[1:-1])
    assert said[-1] == "all good"
    assert "OMP_NUM_THREADS" not in os.environ, "two ranks' share of the cores is not that of whatever starts next"
    monkeypatch.setenv("RENIO_KERNELS", "other")
    assert main(["doctor"]) == 2, "an error that can be named"
    assert "RENIO_KERNELS must be torch or triton" in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("setting", ["bf16=false", "bf16=true"])
def test_one_gpu_is_good(capfd, monkeypatch, setting):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor", setting]) == 0, capfd.readouterr().out
    assert "; nccl, " in capfd.readouterr().out
