"""Which layouts a recipe, a world and a model's description allow."""

import json
from pathlib import Path

import pytest

from renio_megatron.config.load import check_models, check_world, load_recipe
from renio_megatron.errors import ConfigError

TRAIN = "model: student\noutput_dir: runs/a\nteacher:\n  model: teacher\n"
SFT = "model: student\noutput_dir: runs/a\n"


@pytest.fixture
def train(write):
    return lambda more="", *overrides: load_recipe("train", write(TRAIN + more), overrides)


@pytest.fixture
def sft(write):
    return lambda more="", *overrides: load_recipe("sft", write(SFT + more), overrides)


INTERLEAVED = ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2")


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        (["parallel.tensor_model_parallel_size=2"], 3, ["takes 2 ranks", "TP 2", "world of 3", "--nproc"]),
        (["parallel.pipeline_model_parallel_size=4"], 2, ["takes 4 ranks", "PP 4", "world of 2"]),
        (["train.global_batch_size=6", "train.micro_batch_size=2"], 2, ["=6", "multiple of 4"]),
        (["parallel.context_parallel_size=4"], 2, ["takes 4 ranks", "CP 4", "world of 2"]),
        (["parallel.virtual_pipeline_model_parallel_size=2"], 1, ["would be ignored", "one pipeline rank"]),
        (
            [*INTERLEAVED, "train.global_batch_size=6", "train.micro_batch_size=2"],
            2,
            ["multiple of 2 micro-batches", "has 3 micro-batches"],
        ),
        (["parallel.overlap_param_gather=true"], 2, ["needs parallel.use_distributed_optimizer=true"]),
        (["parallel.sequence_parallel=true"], 1, ["would be ignored", "tensor_model_parallel_size is 1"]),
        (["train.global_batch_size=1"], 1, ["at least 2 sequences per optimizer step", "got 1.", "normalize=none"]),
        (["weighting.normalize=group", "weighting.group_size=3"], 1, ["group_size=3", "global_batch_size=32"]),
    ],
)
def test_worlds_that_do_not_fit_are_refused(train, overrides, world, words):
    config = train("", *overrides).config
    with pytest.raises(ConfigError) as caught:
        check_world(config, world)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "world"),
    [
        ([], 4),
        (["parallel.tensor_model_parallel_size=2", "train.global_batch_size=6", "train.micro_batch_size=3"], 4),
        (["train.global_batch_size=1", "weighting=uniform"], 1),
        (["train.global_batch_size=1", "weighting.normalize=none"], 1),
        (["weighting.normalize=group", "weighting.group_size=8"], 1),
    ],
)
def test_worlds_that_fit_are_accepted(train, overrides, world):
    check_world(train("", *overrides).config, world)


def test_fine_tuning_on_one_sequence_a_step_is_accepted(sft):
    check_world(sft("", "train.global_batch_size=1").config, 1)


@pytest.fixture
def model(tmp_path):
    def writer(name: str, **changes) -> Path:
        content = {"model_type": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 4}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content | changes))
        return tmp_path / name

    return writer


def test_models_that_can_be_cut_are_accepted(train, model):
    overrides = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=4"]
    check_models(train("", f"model={model('s')}", f"teacher.model={model('t', model_type='llama')}", *overrides).config)


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({"model_type": "gpt2"}, [], ["'gpt2'", "llama, qwen2, qwen3"]),
        ({"model_type": None}, [], ["None", "llama, qwen2, qwen3"]),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3},
            ["parallel.tensor_model_parallel_size=4"],
            ["num_key_value_heads=3", "neither a divisor nor a multiple"],
        ),
        ({"num_attention_heads": 3}, ["parallel.tensor_model_parallel_size=2"], ["num_attention_heads=3"]),
        (
            {"num_attention_heads": 3, "num_key_value_heads": None},
            ["parallel.tensor_model_parallel_size=2"],
            ["num_attention_heads=3"],
        ),
        ({}, ["parallel.pipeline_model_parallel_size=3"], ["num_hidden_layers=4"]),
        ({"num_hidden_layers": "4"}, [], ["num_hidden_layers", "'4'"]),
    ],
)
@pytest.mark.parametrize("whose", ["model", "teacher.model"])
def test_models_that_cannot_be_run_are_refused(train, model, changes, overrides, words, whose):
    good, bad = (
        model("good", num_attention_heads=24, num_key_value_heads=12, num_hidden_layers=12),
        model("bad", **changes),
    )
    other = "teacher.model" if whose == "model" else "model"
    config = train("", f"{whose}={bad}", f"{other}={good}", *overrides).config
    with pytest.raises(ConfigError) as caught:
        check_models(config)
    for word in [f"{whose}: ", "bad/config.json", *words]:
        assert word in str(caught.value)


def test_unreadable_or_missing_models_are_refused(train, model, tmp_path):
    broken = model("broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken/config\.json cannot be read as JSON"):
        check_models(train("", f"model={broken}").config)
    with pytest.raises(ConfigError, match="there is no directory"):
        check_models(train("", f"model={tmp_path / 'none'}").config)


def test_interleaved_stages_must_divide_the_students_layers_and_not_the_teachers(train, model):
    interleaved = [*INTERLEAVED, f"teacher.model={model('t', num_hidden_layers=6)}"]
    check_models(train("", f"model={model('s', num_hidden_layers=8)}", *interleaved).config)
    with pytest.raises(ConfigError, match=r"model: .*=2 times virtual_pipeline_model_parallel_size=2 does not divide"):
        check_models(train("", f"model={model('odd', num_hidden_layers=6)}", *interleaved).config)


PACKED = ("train.max_tokens_per_micro_batch=100", "data.max_prompt_length=60", "rollout.max_completion_length=41")


def test_packed_rows_must_hold_the_longest_sequence(train):
    train("", *PACKED)  # 60 + 41 - 1 tokens are read
    with pytest.raises(ConfigError, match=r"max_tokens_per_micro_batch=100 cannot hold .* make 101 tokens"):
        train("", PACKED[0], PACKED[2], "data.max_prompt_length=61")
    # Two context ranks pad a sequence to a multiple of 4.
    with pytest.raises(ConfigError, match="Raise it to 103"):
        train("", *PACKED, "parallel.context_parallel_size=2")


def test_settings_that_packing_or_plain_activations_ignore_are_refused(train):
    with pytest.raises(ConfigError, match=r"train.micro_batch_size .*packs as many sequences as fit"):
        train("", *PACKED, "train.micro_batch_size=2")
    with pytest.raises(ConfigError, match=r"train.recompute_num_layers .*recompute_granularity=full"):
        train("", "train.recompute_num_layers=1")


def test_full_recomputation_is_uniform_by_single_layers_unless_it_is_told(train):
    full = "train.recompute_granularity=full"
    assert train("", full).config.train.recomputed_layers == ("uniform", 1)
    told = train("", full, "train.recompute_method=block", "train.recompute_num_layers=3").config.train
    assert told.recomputed_layers == ("block", 3)
    assert train("", "train.recompute_granularity=selective").config.train.recomputed_layers is None


@pytest.mark.parametrize("method", ["uniform", "block"])
def test_recomputed_groups_must_divide_a_stage_where_they_are_uniform(train, model, method):
    overrides = [
        f"model={model('s', num_hidden_layers=12)}",
        f"teacher.model={model('t', num_hidden_layers=10)}",
        "train.recompute_granularity=full",
        f"train.recompute_method={method}",
        *INTERLEAVED,
    ]
    check_models(train("", *overrides, "train.recompute_num_layers=3").config)
    config = train("", *overrides, "train.recompute_num_layers=2").config
    if method == "block":
        check_models(config)
        return
    with pytest.raises(ConfigError, match=r"recompute_num_layers=2 does not divide the 3 layers of a pipeline stage"):
        check_models(config)
