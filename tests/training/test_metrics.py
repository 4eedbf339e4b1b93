"""Tallies, sinks and the reader of metrics.jsonl."""

import json
import math
from pathlib import Path

import pytest
import torch

from renio_megatron.errors import CheckpointError, DataError, NumericsError
from renio_megatron.training.metrics.accumulator import MetricAccumulator
from renio_megatron.training.metrics.registry import MAXIMA, MEANS, METRICS, RENAMED_METRICS
from renio_megatron.training.metrics.sinks import JsonlSink, TensorBoardSink, read_metrics
from tests.helpers.paths import ROOT


def two_ranks() -> tuple[MetricAccumulator, MetricAccumulator]:
    first, second = MetricAccumulator(), MetricAccumulator()
    first.add("rollout/accuracy", 3, 4)
    first.add("weight/mean", 2.5, 2)
    first.add_max("weight/max", 1.5)
    second.add("rollout/accuracy", 0, 2)
    second.add_max("weight/max", 4.0)
    second.add("loss/kl", 0.0, 0)
    return first, second


# 3 of 4 and 0 of 2 are 3 of 6, not the mean of 3/4 and 0.
JOINED = {"weight/mean": 1.25, "weight/max": 4.0, "rollout/accuracy": 0.5}


def test_every_metric_has_a_reduction_that_a_tally_knows():
    assert set(MEANS) | set(MAXIMA) == {name for name in METRICS if "*" not in name}
    assert all(metric.unit and metric.description for metric in METRICS.values())


def test_merge_joins_sums_before_dividing():
    first, second = two_ranks()
    first.merge(second)
    assert first.result() == JOINED
    assert first.sums()["rollout/accuracy"] == (3.0, 6.0)
    assert first.maxima() == {"weight/max": 4.0}


def test_packed_lists_can_be_reduced_elementwise():
    packed = [accumulator.pack() for accumulator in two_ranks()]
    sums = torch.tensor([sums for sums, _ in packed], dtype=torch.float64).sum(0).tolist()
    maxima = torch.tensor([maxima for _, maxima in packed], dtype=torch.float64).amax(0).tolist()
    assert MetricAccumulator.unpack(sums, maxima).result() == JOINED


def test_result_is_in_the_order_of_the_table_and_drops_empty_means():
    accumulator = MetricAccumulator()
    accumulator.add("eval/accuracy_greedy", 1, 2)
    accumulator.add("loss/kl", 0.0, 0)
    accumulator.add("loss", 3)
    assert list(accumulator.result().items()) == [("loss", 3.0), ("eval/accuracy_greedy", 0.5)]


@pytest.mark.parametrize("values", [(1.0, math.nan), (math.nan, 1.0)])
def test_nan_survives_a_maximum(values):
    accumulator = MetricAccumulator()
    for value in values:
        accumulator.add_max("weight/max", value)
    assert math.isnan(accumulator.result()["weight/max"])


def test_unknown_name_is_refused_and_the_nearest_named():
    with pytest.raises(KeyError, match="weight/mean"):
        MetricAccumulator().add("weight/means", 1.0)


def test_a_metric_of_an_earlier_version_is_refused_and_read_with_its_new_name(tmp_path):
    page = (ROOT / "docs" / "reference" / "renamed.md").read_text()
    for old, new in RENAMED_METRICS.items():
        assert f"metric `{old}` | `{new}`" in page
        with pytest.raises(KeyError, match=f"called '{new}' now"):
            MetricAccumulator().add(old, 1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5, "renio/weight_max": 3.0}\n{"step": 2, "weight/max": 2.0}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 0.5, "weight/max": 3.0}, {"step": 2, "weight/max": 2.0}]


def test_wrong_reduction_is_refused():
    with pytest.raises(ValueError, match="add_max"):
        MetricAccumulator().add("weight/max", 1.0)
    with pytest.raises(ValueError, match=r"MetricAccumulator\.add\."):
        MetricAccumulator().add_max("loss", 1.0)


def test_jsonl_rows_are_ordered_floats_without_unknown_values(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(3, {"lr": 1, "loss": torch.tensor(0.25), "grad_norm": None, "step": 3})
    assert path.read_text() == '{"step": 3, "loss": 0.25, "lr": 1.0}\n'
    sink.close()
    sink.close()


def test_jsonl_refuses_nan_and_unknown_names_without_writing(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(NumericsError, match=r"step 7: grad_norm = nan"):
        sink.write(7, {"loss": 1.0, "grad_norm": math.nan})
    with pytest.raises(KeyError, match="grad_norm"):
        sink.write(7, {"gradnorm": 1.0})
    assert sink.path.read_bytes() == b""


def test_jsonl_continues_after_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    sink = JsonlSink(path)
    sink.write(2, {"loss": 1.5})
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]


def test_jsonl_purges_the_steps_that_are_run_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5)))
    JsonlSink(path, purge_step=3).write(3, {"loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 9.0)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_read_keeps_a_whole_last_line_without_newline(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", ["{broken", '{"loss": 1.0}', "[1]"])
def test_read_names_the_broken_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_errors_of_the_disk_name_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing\.jsonl"):
        read_metrics(tmp_path / "missing.jsonl")
    occupied = tmp_path / "occupied"
    occupied.write_text("a file, not a directory")
    with pytest.raises(CheckpointError, match="occupied"):
        JsonlSink(occupied / "metrics.jsonl")
    with pytest.raises(CheckpointError, match="occupied"):
        TensorBoardSink(occupied / "events")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_is_named():
    sink = JsonlSink("/dev/full")
    with pytest.raises(CheckpointError, match="/dev/full: No space left"):
        sink.write(1, {"loss": 1.0})


def test_failed_write_leaves_whole_lines_only(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"loss": 1.0})
    real = sink._file

    class Filling:
        """Takes five bytes, then has no space."""

        space = 5

        def write(self, data):
            if not self.space:
                raise OSError(28, "No space left on device")
            self.space = 0
            return real.write(data[:5])

        fileno, truncate = real.fileno, real.truncate

    sink._file = Filling()
    with pytest.raises(CheckpointError, match="No space left"):
        sink.write(2, {"loss": 2.0})
    assert sink.path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_tensorboard_has_the_values_and_purges_on_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        first.write(step, {"step": step, "loss": float(step), "lr": None})
    first.close()
    second = TensorBoardSink(tmp_path, purge_step=3)
    second.write(3, {"loss": 30.0})
    second.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
