"""What `distillation_loss` and its settings refuse, by the text that names the culprit."""

from __future__ import annotations

import pytest
import torch

from renio_megatron import LossConfig, VocabShard, WeightingConfig, distillation_loss
from renio_megatron.errors import ConfigError, LayoutError

LONG = torch.tensor([0, 1])
GOOD = {"student_logits": torch.zeros(2, 4), "teacher_logits": torch.zeros(2, 4), "token_ids": LONG, "owner": LONG}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logits": torch.zeros(2, 5)}, r"student_logits and teacher_logits must both be \[N, L\].*\(2, 5\)"),
        ({"student_logits": torch.zeros(1, 2, 4), "teacher_logits": torch.zeros(1, 2, 4)}, r"must both be \[N, L\]"),
        ({"teacher_logits": torch.zeros(2, 4, device="meta")}, "student_logits are on cpu, teacher_logits on meta"),
        ({"shard": VocabShard(0, 5, 5)}, "logits have 4 columns, the shard"),
        ({"token_ids": LONG.int()}, r"token_ids must be int64 \[2\]"),
        ({"token_ids": LONG[:1]}, r"token_ids must be int64 \[2\]"),
        ({"token_ids": LONG + 3}, r"token_ids must lie in \[0, 4\); got values from 3 to 4"),
        ({"token_ids": LONG + 2, "shard": VocabShard(0, 4, 3)}, r"token_ids must lie in \[0, 3\)"),
        ({"owner": LONG.float()}, r"owner must be int64 \[2\]"),
        ({"owner": LONG - 1}, r"owner must lie in \[0, 2\); got values from -1"),
        ({"owner": LONG + 1}, r"owner must lie in \[0, 2\)"),
        ({"weights": torch.ones(3)}, r"weights must be \[2\]"),
        ({"sequence_lengths": LONG[:1]}, r"sequence_lengths must be \[2\]"),
        ({"sequence_lengths": LONG}, "says 0 tokens for sequence 0, and 1 of them are here"),
        ({"num_sequences": 2.0}, r"num_sequences must be a whole number of at least 0; got 2\.0"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    with pytest.raises(LayoutError, match=message):
        distillation_loss(**{**GOOD, "num_sequences": 2, **change})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-1, 4, 4), "start=-1"),
        ((3, 2, 4), "start=3, stop=2"),
        ((0, 4, 0), "vocab_size=0"),
        ((0, 3, 4), "does not hold all 4 columns"),
        ((1, 4, 4), "does not hold all 4 columns"),
    ],
)
def test_impossible_shards(settings, message):
    with pytest.raises(LayoutError, match=message):
        VocabShard(*settings)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (LossConfig, {"beta": -0.1}, "loss.beta"),
        (LossConfig, {"beta": float("nan")}, "loss.beta"),
        (LossConfig, {"temperature": 0.0}, "loss.temperature"),
        (LossConfig, {"temperature": float("inf")}, "loss.temperature"),
        (LossConfig, {"entry_clip": 0.0}, "loss.entry_clip"),
        (LossConfig, {"entry_clip": 0.05, "entry_floor": 0.01}, "loss.entry_floor"),
        (WeightingConfig, {"threshold": float("nan")}, "weighting.threshold"),
        (WeightingConfig, {"threshold": 3.0}, r"weighting.ceiling \(2.5\) is below weighting.threshold"),
        (WeightingConfig, {"temperature": 0.0}, "weighting.temperature"),
        (WeightingConfig, {"normalize": "batch_mean"}, "weighting.normalize must be one of batch, group, ema, none"),
        (WeightingConfig, {"normalize": "group"}, "weighting.group_size"),
        (WeightingConfig, {"normalize": "group", "group_size": 0}, "weighting.group_size"),
        (WeightingConfig, {"ema_decay": 1.0}, "weighting.ema_decay"),
        (WeightingConfig, {"cap": 0.0}, "weighting.cap"),
    ],
)
def test_settings_out_of_range(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_an_unknown_weighting_lists_the_choices():
    with pytest.raises(ConfigError, match=r"weighting.name must be one of renio, uniform"):
        distillation_loss(**GOOD, num_sequences=2, weighting=WeightingConfig(name="renoi"))
