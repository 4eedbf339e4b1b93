"""The recipes that ship can be run as they stand, and the models that ship are what the recipes promise."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from renio_megatron.config.load import check_models, check_world, load_recipe
from renio_megatron.config.schema import DistillationConfig, SftConfig
from renio_megatron.data.sources.modchain import END, PAD, SYMBOLS, make_problem
from renio_megatron.models.shipped import QUICKSTART_RECIPE, SHIPPED
from renio_megatron.tools.quickstart import QUICKSTART_VARIANTS
from tests.helpers.paths import EXAMPLES, RECIPES, ROOT, kind_of_example

ASSETS = QUICKSTART_RECIPE.parent
SHIPPED_MODELS = {"modchain/student", "modchain/teacher"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_recipes_of_both_kinds():
    names = {_name(path) for path in RECIPES}
    assert {"examples/modchain.yaml", "examples/modchain/student.yaml", "examples/modchain/teacher.yaml"} <= names
    assert set(SHIPPED) == SHIPPED_MODELS


@pytest.mark.parametrize("path", [*RECIPES, QUICKSTART_RECIPE], ids=_name)
def test_a_recipe_can_be_run_as_it_stands(path):
    config = load_recipe(kind_of_example(path), path).config
    assert isinstance(config, SftConfig if kind_of_example(path) == "sft" else DistillationConfig)
    ranks = config.parallel.model_ranks
    check_world(config, ranks)
    names = [config.model, *([config.teacher.model or config.model] if isinstance(config, DistillationConfig) else [])]
    if SHIPPED_MODELS.issuperset(names):
        check_models(config)
    assert not Path(config.output_dir).is_absolute()


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_what_a_recipe_says_of_its_own_command_is_true(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    commands = [word for line in comments for word in line.split() if word.endswith(".yaml")]
    assert commands, "a recipe says how it is run"
    assert set(commands) == {_name(path)}
    assert any(f"renio {kind_of_example(path)} {_name(path)}" in line for line in comments)


@pytest.mark.parametrize("changes", QUICKSTART_VARIANTS.values(), ids=QUICKSTART_VARIANTS)
def test_the_quickstarts_runs_fit_on_two_ranks(changes):
    config = load_recipe("train", QUICKSTART_RECIPE, changes).config
    check_world(config, 2)
    assert config.parallel.model_ranks == 2


def test_modchain_trains_what_the_quickstart_trains():
    mine, quick = (load_recipe("train", path).config for path in (EXAMPLES / "modchain.yaml", QUICKSTART_RECIPE))
    sections = ("model", "teacher", "data", "rollout", "loss", "weighting", "parallel", "evaluate")
    assert {key: getattr(mine, key) for key in sections} == {key: getattr(quick, key) for key in sections}
    free = ("micro_batch_size",)
    assert {key: value for key, value in vars(mine.train).items() if key not in free} == {
        key: value for key, value in vars(quick.train).items() if key not in free
    }
    assert mine.checkpoint.ckpt_format == quick.checkpoint.ckpt_format


def test_recipes_have_no_key_twice():
    class Strict(yaml.SafeLoader):
        """Refuses what YAML would silently take the last of."""

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), keys
        return loader.construct_mapping(node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for path in (*RECIPES, QUICKSTART_RECIPE):
        assert isinstance(yaml.load(path.read_text(), Strict), dict)


def test_the_shipped_models_are_small():
    sizes = [path.stat().st_size for path in ASSETS.glob("*/model.safetensors")]
    assert len(sizes) == 2
    assert sum(sizes) < 3_000_000


@cache
def _greedy_accuracy(name: str) -> float:
    """On 64 evaluation problems, by transformers' own greedy search in one batch; all prompts are of one length."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = ASSETS.parent / name
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    problems = [make_problem(1, "eval", index) for index in range(64)]
    ids = torch.tensor([[SYMBOLS.index(symbol) for symbol in problem.prompt] for problem in problems])
    assert tokenizer([problem.prompt for problem in problems]).input_ids == ids.tolist()
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=32,
            eos_token_id=SYMBOLS.index(END),
            pad_token_id=SYMBOLS.index(PAD),
        )
    texts = ["".join(SYMBOLS[token] for token in row) for row in out[:, ids.shape[1] :].tolist()]
    answers = [text.partition(END)[0][-1:] if END in text else "" for text in texts]
    return sum(given == problem.answer for given, problem in zip(answers, problems, strict=True)) / 64


def test_the_shipped_teacher_knows_the_task():
    assert _greedy_accuracy("modchain/teacher") >= 0.95


def test_the_shipped_student_has_something_to_learn_and_something_to_start_from():
    assert 0.3 < _greedy_accuracy("modchain/student") < 0.6
