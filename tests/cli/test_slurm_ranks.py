"""Ranks that srun started know their place, and half of a place is an error."""

from __future__ import annotations

import pytest

from renio_megatron.cli.main import main
from renio_megatron.cli.slurm import first_host, rank_variables
from renio_megatron.errors import ConfigError
from renio_megatron.megatron.runtime.initialize import _check_address

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
RANK = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node07",
    "MASTER_PORT": "19711",
}


def test_a_task_of_srun_is_a_rank():
    assert rank_variables(TASK) == RANK
    assert rank_variables({**TASK, "MASTER_ADDR": "ib0", "MASTER_PORT": "1"}) == {
        **RANK,
        "MASTER_ADDR": "ib0",
        "MASTER_PORT": "1",
    }
    uneven = {**TASK, "SLURM_STEP_TASKS_PER_NODE": "2,1(x2)"}
    assert "LOCAL_WORLD_SIZE" not in rank_variables(uneven)


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_ID": "4294967291"},  # a batch script
        {"SLURM_STEP_ID": "4294967290"},  # an interactive shell
        {"SLURM_STEP_ID": ""},
        {"SLURM_STEP_NUM_TASKS": "1"},  # it starts its ranks itself, or torchrun does
        {"RANK": "0", "WORLD_SIZE": "8"},  # torchrun has
    ],
)
def test_everything_else_under_slurm_is_not(changes):
    assert rank_variables({**TASK, **changes}) == {}
    assert rank_variables({}) == {}


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"])
def test_half_of_slurms_variables_is_an_error(name):
    with pytest.raises(ConfigError, match=rf"{name} is not set.*let all SLURM_\* through"):
        rank_variables({key: value for key, value in TASK.items() if key != name})


@pytest.mark.parametrize(("name", "missing"), [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_of_torchruns_variables_is_an_error(name, missing, monkeypatch, capsys):
    for other in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    assert main(["train", "none.yaml"]) == 2
    assert f"{name} is set and {missing} is not" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("WORLD_SIZE", "-2"), ("RANK", "")])
def test_a_rank_that_is_no_number_is_an_error(name, value):
    with pytest.raises(ConfigError, match=rf"{name} must be a whole number; got '{value}'"):
        rank_variables({"RANK": "0", "WORLD_SIZE": "2", name: value})


def test_a_rank_without_an_address_is_an_error(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is not set\. torchrun"):
        _check_address()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("a[1-3]", "a1"), ("a[01,05-7],b", "a01"), ("r[1-2]c[03-04]", "r1c03"), ("x-1", "x-1")],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert first_host(nodes) == first
