import pytest

from renio_megatron.config.load import load_recipe
from renio_megatron.config.parser import read_recipe
from renio_megatron.config.resume import differences, to_yaml
from renio_megatron.config.schema import DistillationConfig, SftConfig
from renio_megatron.errors import ConfigError

TRAIN = "model: student\noutput_dir: runs/a\nteacher:\n  model: teacher\n"
SFT = "model: student\noutput_dir: runs/a\n"


@pytest.fixture
def train(write):
    return lambda more="", *overrides: load_recipe("train", write(TRAIN + more), overrides)


@pytest.fixture
def sft(write):
    return lambda more="", *overrides: load_recipe("sft", write(SFT + more), overrides)


def test_a_minimal_recipe_has_the_documented_defaults(train):
    recipe = train()
    assert isinstance(recipe.config, DistillationConfig)
    assert recipe.config.teacher.model == "teacher"
    assert recipe.config.weighting.threshold == 0.8
    assert recipe.config.train.lr == 5e-6
    assert recipe.explicit == {"model", "output_dir", "teacher.model"}


def test_values_take_the_type_of_their_key(train):
    config = train(
        "train: {lr: 1, bf16: true}\nrollout: {top_p: null}\nweighting: {cap: null}\n", "train.adam_eps=1e-3"
    ).config
    assert (config.train.lr, type(config.train.lr)) == (1.0, float)
    assert config.train.adam_eps == 0.001
    assert config.train.bf16 is True
    assert config.rollout.top_p is None
    assert config.weighting.cap is None


def test_overrides_win_over_the_file(train):
    recipe = train("train: {lr: 1e-4, seed: 3}\n", "train.lr=2e-5", "data.source=jsonl", "data.path=a.jsonl")
    assert recipe.config.train.lr == 2e-5
    assert recipe.config.train.seed == 3
    assert {"train.lr", "data.path"} <= recipe.explicit


def test_text_on_the_command_line_needs_no_yaml_quoting(train):
    config = train("", "data.student_template={problem}: answer [", "model=007", "output_dir=on").config
    assert config.data.student_template == "{problem}: answer ["
    assert config.model == "007"
    assert config.output_dir == "on"


def test_quoted_text_on_the_command_line_is_yaml(train):
    assert train("", r'data.student_template="{problem}\n"').config.data.student_template == "{problem}\n"


def test_interpolations_are_resolved(train):
    assert train("train: {seed: 5}\ndata: {seed: '${train.seed}'}\n").config.data.seed == 5


def test_null_for_a_key_that_cannot_be_null_is_its_default_and_not_explicit(train):
    recipe = train("weighting: {ema_decay: null}\nloss:\n")
    assert recipe.config.weighting.ema_decay == 0.9
    assert "weighting.ema_decay" not in recipe.explicit


def test_a_plain_word_starts_a_section_afresh(train):
    recipe = train("weighting: {normalize: group, group_size: 4}\n", "weighting=renio", "weighting.threshold=1.0")
    assert recipe.config.weighting.name == "renio"
    assert recipe.config.weighting.group_size is None
    assert recipe.config.weighting.threshold == 1.0
    assert {key for key in recipe.explicit if key.startswith("weighting")} == {"weighting.name", "weighting.threshold"}
    assert train("weighting: {normalize: group, group_size: 4}\n", "weighting=uniform").dropped == {}


def test_a_plain_word_for_the_teacher_drops_its_model(train):
    config = train("data: {teacher_template: '{problem} {solution}'}\n", "teacher=initial").config
    assert (config.teacher.kind, config.teacher.model) == ("initial", None)


@pytest.mark.parametrize(
    ("more", "overrides", "words"),
    [
        ("train: {lrr: 1}\n", [], ["recipe.yaml", "'train.lrr'", "'train.lr'"]),
        ("train: {learning_rate: 1}\n", [], ["'train.learning_rate'", "Its name here is train.lr."]),
        ("train: {zzzzqqq: 1}\n", [], ["'train.zzzzqqq'", "The keys of train are", " lr,"]),
        ("lr: 1\n", [], ["recipe.yaml", "'lr'", "'train.lr'"]),
        ("weightin: {name: uniform}\n", [], ["'weightin'", "'weighting'"]),
        ("loss: {zzzzqqq: 1}\n", [], ["'loss.zzzzqqq'", "beta, divergence, temperature, entry_clip, entry_floor"]),
        ("train.lr: 1\n", [], ["'train.lr'", "in one piece", "`train:`"]),
        ("3: 1\n", [], ["unknown key '3'"]),
        ("", ["train.batch_size=4"], ["command line", "'train.batch_size'", "_batch_size'"]),
        ("", ["loss.treshold=4"], ["command line", "'loss.treshold'", "'weighting.threshold'"]),
        ("", ["train.lr"], ["command line", "'train.lr'", "key=value"]),
        ("", ["=3"], ["key=value"]),
        ("", ["train.lr=1", "train.lr=2"], ["train.lr=2", "once"]),
        ("", ["weighting.cap=5", "weighting=uniform"], ["would undo weighting.cap"]),
        ("", ["loss=kl"], ["loss is a section", "beta", "'kl'"]),
        ("", ["train.lr=[1"], ["train.lr=[1", "not valid YAML"]),
        ("train: [1, 2]\n", [], ["recipe.yaml", "train is a section", "[1, 2]"]),
        ("train: {lr: fast}\n", [], ["recipe.yaml: train.lr must be a number", "'fast'"]),
        ("train: {train_iters: 1.5}\n", [], ["train.train_iters must be a whole number", "1.5"]),
        ("train: {train_iters: true}\n", [], ["train.train_iters must be a whole number", "True"]),
        ("train: {bf16: maybe}\n", [], ["train.bf16 must be true or false", "'maybe'"]),
        ("train: {lr: {a: 1}}\n", [], ["train.lr must be a number", "{'a': 1}"]),
        ("data: {student_template: {problem}}\n", [], ["data.student_template must be text", "quotes"]),
        ("data: {grader: no}\n", [], ["data.grader must be text, or null", "False"]),
        ("", ["rollout.top_k=many"], ["command line: rollout.top_k must be a whole number, or null"]),
        ("data: {seed: '${train.sed}'}\n", [], ["recipe.yaml: data.seed", "train.sed"]),
        ("head: {logits_dtype: fp8}\n", [], ["head.logits_dtype", "fp32, bf16", "'fp8'"]),
        ("head: {logits_dtype: bf16}\n", [], ["head.logits_dtype=bf16", "train.bf16=false"]),
        ("head: {chunk_size: 0}\n", [], ["head.chunk_size must be at least 1"]),
        ("", ["teacher.payload_device=disk"], ["teacher.payload_device", "device, host, recompute"]),
        (
            "parallel: {pipeline_model_parallel_size: 2}\n",
            ["teacher.payload_device=recompute"],
            ["teacher.payload_device=recompute needs", "Choose host"],
        ),
        ("", ["precision.backend=cuda"], ["precision.backend", "auto, te, local"]),
        ("", ["teacher_precision.fp8=e5m2"], ["teacher_precision.fp8 must be one of hybrid, e4m3", "'e5m2'"]),
        ("", ["precision.fp8=hybrid", "precision.fp8_recipe=rowwise"], ["precision.fp8_recipe", "blockwise, mxfp8"]),
        ("", ["precision.fp8=hybrid"], ["precision.fp8=hybrid with train.bf16=false", "train.bf16=true"]),
        ("", ["teacher_precision.fp8=e4m3"], ["teacher_precision.fp8=e4m3 with train.bf16=false"]),
        ("", ["precision.fp8=e4m3", "precision.backend=local"], ["backend=local", "precision.emulate_fp8=true"]),
        (
            "",
            ["precision.fp8=e4m3", "precision.backend=te", "precision.emulate_fp8=true"],
            ["backend=te", "Remove one"],
        ),
        (
            "precision: {fp8: e4m3, emulate_fp8: true, fp8_recipe: delayed}\n",
            [],
            ["fp8_recipe=delayed", "tensorwise, blockwise or mxfp8"],
        ),
        (
            "precision: {fp8: e4m3, fp8_recipe: delayed, first_last_layers_bf16: true}\n",
            [],
            ["first_last_layers_bf16=true", "fp8_recipe=tensorwise"],
        ),
        (
            "precision: {fp8: e4m3, fp8_param_gather: true, fp8_recipe: mxfp8}\ntrain: {bf16: true}\n",
            [],
            ["fp8_recipe=mxfp8", "gradients' buffer", "tensorwise or blockwise"],
        ),
        (
            "precision: {fp8: e4m3, fp8_param_gather: true, fp8_recipe: delayed}\ntrain: {bf16: true}\n",
            [],
            ["fp8_recipe=delayed", "a scale that nothing has measured"],
        ),
        (
            "precision: {fp8: e4m3, fp8_param_gather: true}\ntrain: {bf16: true}\n",
            [],
            ["parallel.use_distributed_optimizer=true"],
        ),
        ("", ["teacher_precision.fp8=e4m3", "teacher_precision.fp8_recipe=delayed"], ["a teacher never takes"]),
        ("", ["precision.num_layers_at_end_in_bf16=-1"], ["precision.num_layers_at_end_in_bf16 must be at least 0"]),
        ("weighting: {name: unifrom}\n", [], ["weighting.name", "renio, uniform", "'unifrom'"]),
        ("data: {source: json}\n", [], ["data.source", "modchain, jsonl, datasets, reasoning_gym"]),
        ("teacher: {}\nmodel: b\n", [], ["duplicate key"]),
        ("data: {seed: 1\n", [], ["line", "not valid YAML"]),
    ],
)
def test_mistakes_are_named(train, more, overrides, words):
    with pytest.raises(ConfigError) as caught:
        train(more, *overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("# nothing\n", ["empty"]),
        ("- a\n- b\n", ["mapping", "list"]),
        ("output_dir: a\nteacher: initial\n", ["model is missing"]),
        ("model: a\nteacher: {model: b}\n", ["output_dir is missing"]),
        ("model: a\noutput_dir: b\n", ["teacher.model"]),
        ("model: a\noutput_dir: b\n  x: 1\n", ["line 3"]),
    ],
)
def test_files_that_are_no_recipe_are_refused(write, text, words):
    with pytest.raises(ConfigError) as caught:
        load_recipe("train", write(text))
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no recipe"):
        load_recipe("train", tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_recipe("train", tmp_path)


FILES = "data: {source: jsonl, path: a, eval_path: b}\n"


@pytest.mark.parametrize(
    ("more", "key", "reason"),
    [
        ("weighting: {name: uniform, normalize: batch}", "weighting.normalize", "uniform"),
        ("weighting: {name: uniform, cap: 10.0}", "weighting.cap", "uniform"),
        ("weighting: {group_size: 2}", "weighting.group_size", "not group"),
        ("weighting: {ema_decay: 0.5}", "weighting.ema_decay", "not ema"),
        ("weighting: {normalize: ema, cap: 3}", "weighting.cap", "batch or group"),
        ("weighting: {normalize: none, cap: 3}", "weighting.cap", "batch or group"),
        ("loss: {entry_floor: 0.0}", "loss.entry_floor", "entry_clip"),
        ("evaluate: {samples: 5}", "evaluate.samples", "every is 0"),
        ("evaluate: {temperature: 0.5}", "evaluate.temperature", "every is 0"),
        ("evaluate: {max_completion_length: 5}", "evaluate.max_completion_length", "every is 0"),
        ("data: {task: chess}", "data.task", "reasoning_gym"),
        ("data: {size: 5}", "data.size", "reasoning_gym"),
        ("data: {path: a}", "data.path", "jsonl and datasets"),
        ("data: {eval_path: a}\nevaluate: {every: 5}", "data.eval_path", "jsonl and datasets"),
        (FILES, "data.eval_path", "every is 0"),
        ("data: {answer_key: a}", "data.answer_key", "jsonl and datasets"),
        ("data: {teacher_prompt_key: a}", "data.teacher_prompt_key", "jsonl and datasets"),
        ("data: {subset: a}", "data.subset", "only data.source=datasets"),
        ("data: {source: jsonl, path: a, split: a}", "data.split", "only data.source=datasets"),
        ("data: {source: jsonl, path: a, eval_split: a}", "data.eval_split", "only data.source=datasets"),
        ("data: {source: datasets, path: a, eval_split: a}", "data.eval_split", "every is 0"),
        ("data: {student_system: a}", "data.student_system", "chat is false"),
        ("data: {enable_thinking: false}", "data.enable_thinking", "chat"),
        ("data: {teacher_enable_thinking: true}", "data.teacher_enable_thinking", "chat"),
        ("train: {min_lr: 1e-6}", "train.min_lr", "constant"),
        ("precision: {fp8_recipe: tensorwise}", "precision.fp8_recipe", "fp8 is null"),
        ("teacher_precision: {emulate_fp8: true}", "teacher_precision.emulate_fp8", "fp8 is null"),
        (
            "precision: {fp8: e4m3, emulate_fp8: true, num_layers_at_end_in_bf16: 2}",
            "precision.num_layers_at_end_in_bf16",
            "first_last_layers_bf16 is false",
        ),
        (
            "precision: {fp8: e4m3, emulate_fp8: true, fp8_param_gather: true}",
            "precision.fp8_param_gather",
            "keeps parameters",
        ),
        (
            "teacher_precision: {fp8: e4m3, fp8_param_gather: true}\ntrain: {bf16: true}",
            "teacher_precision.fp8_param_gather",
            "never gathered",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(train, more, key, reason):
    with pytest.raises(ConfigError, match="would be ignored") as caught:
        train(more + "\n")
    line = next(line for line in str(caught.value).splitlines() if line.startswith(f"{key} "))
    assert reason in line
    assert "Remove it or set it to null" in line


def test_a_teacher_model_beside_a_self_teacher_is_refused(train):
    with pytest.raises(ConfigError, match=r"teacher\.model is set but would be ignored"):
        train("data: {teacher_template: '{problem}!'}\n", "teacher.kind=initial", "teacher.model=teacher")


def test_every_setting_without_effect_is_named_once(train):
    with pytest.raises(ConfigError) as caught:
        train("weighting: {name: uniform, cap: 3, group_size: 2, ema_decay: 0.9}\nevaluate: {samples: 5}\n")
    keys = [line.split()[0] for line in str(caught.value).splitlines()]
    assert sorted(keys) == ["evaluate.samples", "weighting.cap", "weighting.ema_decay", "weighting.group_size"]


@pytest.mark.parametrize(
    "more",
    [
        "weighting: uniform\nalso_report: [{name: renio, threshold: 1.0, ceiling: 3.0, temperature: 2.0}]",
        "weighting: {name: uniform, cap: null, group_size: null}",
        "weighting: {normalize: ema, ema_decay: 0.5}",
        "weighting: {normalize: group, group_size: 4, cap: 5}",
        "loss: {entry_clip: 0.05, entry_floor: 0.0}",
        "evaluate: {every: 5, samples: 5, max_completion_length: 4}",
        FILES + "evaluate: {every: 5}",
        "data: {source: datasets, path: a, problem_key: q}",
        "data: {source: datasets, path: a, eval_split: test, subset: b}\nevaluate: {every: 1}",
        "data: {source: reasoning_gym, task: chess, size: 5}",
        "data: {chat: true, enable_thinking: false, teacher_enable_thinking: true}",
        "train: {lr_decay_style: cosine, min_lr: 1e-6}",
        "precision: {fp8: e4m3, emulate_fp8: true, first_last_layers_bf16: true, num_layers_at_end_in_bf16: 2}",
        "teacher_precision: {fp8: hybrid, fp8_recipe: blockwise}\nprecision: {backend: local}\ntrain: {bf16: true}",
    ],
)
def test_a_setting_with_an_effect_is_accepted(train, more):
    train(more + "\n")


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("data: {source: jsonl}", "data.path"),
        ("data: {source: datasets}", "data.path"),
        ("data: {source: jsonl, path: a}\nevaluate: {every: 1}", "data.eval_path"),
        ("data: {source: jsonl, path: a, eval_split: test}\nevaluate: {every: 1}", "data.eval_path"),
        ("data: {source: datasets, path: a}\nevaluate: {every: 1}", "data.eval_path"),
        ("data: {source: reasoning_gym}", "data.task"),
    ],
)
def test_a_setting_that_another_needs_is_asked_for(train, more, key):
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        train(more + "\n")


def test_fine_tuning_has_rules_of_its_own(sft):
    assert isinstance(sft().config, SftConfig)
    assert sft("init: random\n").config.init == "random"
    with pytest.raises(ConfigError, match="init must be one of pretrained, random"):
        sft("init: scratch\n")
    with pytest.raises(ConfigError, match=r"evaluate\.max_completion_length is missing"):
        sft("evaluate: {every: 1}\n")
    with pytest.raises(ConfigError, match=r"data\.teacher_template is set .* no teacher"):
        sft("data: {teacher_template: '{problem}!'}\n")
    with pytest.raises(ConfigError, match="unknown key 'weighting'"):
        sft("weighting: {name: uniform}\n")


@pytest.mark.parametrize(
    "more",
    [
        "",
        "data: {teacher_template: '{problem}'}",
        "data: {chat: true, enable_thinking: true, teacher_enable_thinking: true}",
    ],
)
def test_a_self_teacher_with_the_students_view_is_refused(train, more):
    with pytest.raises(ConfigError, match="exactly zero at the first step"):
        train(more + "\n", "teacher=initial")


@pytest.mark.parametrize(
    "more", ["data: {teacher_template: '{solution}'}", "data: {chat: true, teacher_enable_thinking: true}"]
)
def test_a_self_teacher_with_a_view_of_its_own_is_accepted(train, more):
    assert train(more + "\n", "teacher=initial").config.teacher.kind == "initial"


def test_written_settings_hold_every_value_and_differ_in_none(train):
    config = train("train: {lr: 3.3e-07}\nweighting: {cap: null}\ndata: {teacher_template: 'a: {solution}\n'}\n").config
    text = to_yaml(config)
    assert text.startswith("model: student\n")
    assert "cap: null" in text
    assert differences(text, config) == []


def test_written_settings_can_be_loaded_without_the_rules(train, write):
    config = train("data: {seed: 4}\n").config
    assert read_recipe(DistillationConfig, write(to_yaml(config))).config == config


def test_differences_name_key_old_and_new(train):
    old = to_yaml(train().config)
    new = train("", "train.seed=7", "output_dir=elsewhere", "weighting.cap=null").config
    assert [str(one) for one in differences(old, new)] == [
        "weighting.cap: was 10.0, is now None",
        "train.seed: was 1234, is now 7",
    ]
    older = "".join(
        line for line in old.splitlines(True) if not line.startswith(("  prefix:", "  seed: 1234", "  cap:"))
    )
    assert differences(older, train().config) == []
    assert [str(one) for one in differences(older, new)] == [
        "weighting.cap: was 10.0, is now None",
        "train.seed: was 1234, is now 7",
    ]
    gone = old + "extra: 1\n"
    assert "extra: was 1, is now '(not there)'" in map(str, differences(gone, new))
    with pytest.raises(ConfigError):
        differences("- 1", new)


def test_an_algorithm_selects_the_keys_of_a_recipe(write):
    assert load_recipe("train", write(TRAIN)).config.algorithm == "distillation"
    chosen = load_recipe("train", write(SFT), ["algorithm=sft", "init=random"])
    assert (type(chosen.config), chosen.config.algorithm) == (SftConfig, "sft")
    assert load_recipe("sft", write(f"algorithm: sft\n{SFT}")).config == load_recipe("sft", write(SFT)).config
    with pytest.raises(ConfigError, match="algorithm must be one of distillation, sft; got 'gpro'"):
        load_recipe("train", write(TRAIN), ["algorithm=gpro"])
    with pytest.raises(ConfigError, match="algorithm=distillation is for `renio train`"):
        load_recipe("sft", write(SFT), ["algorithm=distillation"])
    with pytest.raises(ConfigError, match="unknown key 'init'"):
        load_recipe("train", write(f"{TRAIN}init: random\n"))


def test_a_renamed_key_is_refused_with_its_new_name_and_read_in_a_run_of_before(train, write):
    with pytest.raises(ConfigError, match=r"weighting\.normalise is called weighting\.normalize now"):
        train("weighting: {normalise: ema}\n")
    with pytest.raises(ConfigError, match=r"command line: weighting\.normalise is called weighting\.normalize now"):
        train("", "weighting.normalise=ema")
    config = train("weighting: {normalize: ema}\n").config
    before = to_yaml(config).replace("normalize: ema", "normalise: ema")
    assert "normalise: ema" in before and differences(before, config) == []
    (line,) = differences(before.replace("normalise: ema", "normalise: none"), config)
    assert str(line) == "weighting.normalize: was 'none', is now 'ema'"
