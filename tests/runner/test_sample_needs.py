"""What a weighting needs of samples, and nobody can tell, is said before the first step."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from renio_megatron.config import DataConfig, RolloutConfig, TeacherConfig, TrainConfig
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.runner.inputs import read_inputs
from tests.fakes.strategies import SeenWeighting

RECORDS = [
    {"problem": "^7+5=", "solution": "+75", "answer": "2", "level": 3},
    {"problem": "^2+2=", "solution": "+24", "answer": "4", "level": 0.5},
]


@pytest.fixture
def config(tmp_path):
    def of(*needs, records=RECORDS, **data):
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        return DistillationConfig(
            model="modchain/student",
            teacher=TeacherConfig(model="modchain/teacher"),
            data=replace(DataConfig(source="jsonl", path=str(path)), **data),
            train=TrainConfig(train_iters=1, global_batch_size=2),
            weighting=SeenWeighting(wants=needs),
            rollout=RolloutConfig(max_completion_length=8),
            output_dir=str(tmp_path / "run"),
        )

    return of


@pytest.mark.parametrize("level", [None, "high", True])
def test_a_column_without_a_number_is_named(config, level):
    assert read_inputs(config("column level", grader="none")).grader is None
    records = [RECORDS[0], {**RECORDS[1], "level": level}]
    with pytest.raises(DataError, match=rf"its record has {level!r} in the column 'level', where the weighting reads"):
        read_inputs(config("column level", records=records, grader="none"))
    read_inputs(config("position", records=records, grader="none"))


@pytest.mark.parametrize("level", [float("nan"), float("inf"), 10**400])
def test_a_number_that_is_none_is_named(config, level):
    with pytest.raises(DataError, match="in the column 'level', where the weighting reads"):
        read_inputs(config("column level", records=[RECORDS[0], {**RECORDS[1], "level": level}], grader="none"))


def test_a_need_that_nothing_is_called_is_refused_before_the_first_step(config):
    with pytest.raises(
        ConfigError, match=r"needs entropy, which nothing is called\. There are student_logp, teacher_l"
    ):
        read_inputs(config("entropy"))


def test_verdicts_need_a_grader(config):
    assert read_inputs(config("verdict", grader="modchain")).grader is not None
    with pytest.raises(ConfigError, match=r"needs verdicts, and nothing can be graded.*Set data\.answer_key"):
        read_inputs(config("verdict", grader="none"))
