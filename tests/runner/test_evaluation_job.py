"""A job of `renio evaluate` as its command line describes it: what a model is asked, and settings that cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from renio_megatron.cli.evaluate import EPILOG
from renio_megatron.config.sections.evaluation_job import EvaluationJobConfig
from renio_megatron.errors import ConfigError
from renio_megatron.runner.evaluation_job import EvaluateOptions, check_chat, read_job
from tests.e2e.test_evaluate import renio

MISSING = "needs a tokenizer with a chat template, and that of"


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "1 + 1?", "answer": "2"}) + "\n")
    return path


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        (["view=math-bare"], r"1 + 1?\n\nWork"),
        (["view=math-bare", "instruction=Be brief."], r"1 + 1?\n\nBe brief.\n\nWork"),
        (["template=Q: {problem}"], "Q: 1 + 1?"),
        (["template=Q: {problem}", "instruction=Go."], r"Q: 1 + 1?\n\nGo."),
        (["instruction=''"], "1 + 1?"),
    ],
)
def test_a_template_with_a_text_of_its_own_stands_for_the_benchmarks_instruction(problems, settings, asked):
    options = EvaluateOptions("http://localhost:1/v1", (str(problems),), model="m", overrides=tuple(settings))
    job = read_job(options)
    (benchmark,) = job.benchmarks
    assert benchmark.instruction
    text = job.view(is_chat=True).fill(job.asked(benchmark, benchmark.records[0]))
    assert text.startswith(asked.replace(r"\n", "\n"))
    assert text.count(r"\boxed") == ("view=math-bare" in settings)


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"system": "Hi"}, "system"), ({"chat": True}, "chat=true"), ({"enable_thinking": True}, "enable_thinking")],
)
def test_what_a_chat_template_must_write_is_refused_without_one(settings, word):
    config = EvaluationJobConfig(**settings)
    with pytest.raises(ConfigError, match=MISSING) as caught:
        check_chat(config, SimpleNamespace(chat_template=None), Path("models/mine"))
    assert str(caught.value).startswith(word)
    assert "data." not in str(caught.value)
    check_chat(config, SimpleNamespace(chat_template="{{ enable_thinking }}"), Path("models/mine"))
    if word == "enable_thinking":
        with pytest.raises(ConfigError, match="enable_thinking: the chat template of 'models/mine' does not read it"):
            check_chat(config, SimpleNamespace(chat_template="{{ messages }}"), Path("models/mine"))
    check_chat(EvaluationJobConfig(chat=False), SimpleNamespace(chat_template=None), Path("models/mine"))


def test_it_is_refused_before_anything_is_drawn(problems):
    ended = renio("evaluate", "modchain/teacher", "--benchmark", str(problems), "system=Hi", cwd=problems.parent)
    assert ended.returncode != 0
    assert f"system (or a view's system turn) {MISSING}" in " ".join((ended.stdout + ended.stderr).split())
    assert not (problems.parent / "evaluations").exists()


def test_the_commands_help_lists_every_key():
    for name in vars(EvaluationJobConfig()):
        assert name in EPILOG, name
