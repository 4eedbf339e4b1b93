"""Chat templates as people have them: those that fail, that ignore what they are asked, and that hold the date."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config import DataConfig
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.models.chat_template import ChatTemplate, differing_templates
from tests.data.test_prompts import characters, stream
from tests.helpers.multiprocess import Ranks
from tests.helpers.resuming import rows, same
from tests.helpers.training_cases import save_models

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIXTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
IGNORES = "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
DAY = datetime(2026, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no') }}", "TemplateError: no."),
        ("{{ messages[1].content }}", "UndefinedError"),
        ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_is_one_line_with_its_record(template: str, words: str, tmp_path: Path) -> None:
    prompts = stream(tmp_path, [{"problem": "2+2?"}, {"problem": "3+3?"}], characters(chat=template), chat=True)
    with pytest.raises(DataError) as caught:
        prompts.batch(1, 1)
    message = str(caught.value)
    assert "\n" not in message and "data.jsonl:" in message and "the chat template of " in message and words in message


def test_several_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    tokenizer = characters()
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(ConfigError, match="Keep one template, or one of the name `default`") as caught:
        stream(tmp_path, [{"problem": "2+2?"}], tokenizer, chat=True)
    assert "\n" not in str(caught.value)
    tokenizer.chat_template = {"rag": MIXTRAL, "default": CHATML}
    assert ChatTemplate.of(tokenizer).text == CHATML


@pytest.mark.parametrize("template", [CHATML, MIXTRAL, "{{ messages[0].content }}"])
def test_a_template_that_says_what_it_is_asked_is_no_notice(template: str) -> None:
    assert ChatTemplate.of(characters(chat=template)).notices() == []


def test_a_template_that_leaves_out_the_assistants_header_is_a_notice() -> None:
    [notice] = ChatTemplate.of(characters(chat=IGNORES)).notices()
    assert "does not read add_generation_prompt" in notice
    assert repr("<|im_start|>assistant\n") in notice


@pytest.mark.parametrize("mark", ["<|im_start|>", "<\uff5cUser\uff5c>", "<start_of_turn>"])
def test_a_template_whose_marks_are_no_tokens_is_another_models(mark: str) -> None:
    tokenizer = characters(more="\uff5c")
    tokenizer.chat_template = (
        "{% for m in messages %}" + mark + "{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    [notice] = ChatTemplate.of(tokenizer).notices()
    assert f"writes {mark!r}, which the tokenizer cuts into several tokens" in notice
    assert "the template that belongs to the model" in notice
    tokenizer.add_tokens([mark], special_tokens=True)
    assert ChatTemplate.of(tokenizer).notices() == []


def test_a_teacher_with_another_template_is_told() -> None:
    ours, theirs = characters(chat=CHATML), characters(chat=MIXTRAL)
    told = differing_templates(ours, theirs, "the teacher")
    assert told is not None and told.startswith("the teacher reads prompts in the student's chat template, '<|im_start")
    assert "and its own writes '[INST] What is 2 + 2? [/INST]'" in told
    assert differing_templates(ours, characters(chat=CHATML + "{% if tools %}{% endif %}"), "the teacher") is None
    assert differing_templates(ours, characters(), "the teacher") is None


DATED = "{% if strftime_now is defined %}{{ strftime_now(\"%d %b %Y\") }}|{{strftime_now( '%Y' )}}{% endif %}" + CHATML


def test_the_date_is_the_given_one() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = ChatTemplate.of(characters(chat=DATED), DAY)
    text = template.render([{"role": "user", "content": "2+2?"}], "here")
    assert text.startswith("03 Feb 2026|2026<|im_start|>user\n2+2?")
    [notice] = template.notices()
    assert "writes the date" in notice
    today = ChatTemplate.of(characters(chat=DATED)).render([{"role": "user", "content": "2+2?"}], "here")
    [[theirs], _] = render_jinja_template(
        [[{"role": "user", "content": "2+2?"}]], chat_template=DATED, add_generation_prompt=True
    )
    assert today == theirs  # unless midnight lies between


def test_a_date_that_cannot_be_held_is_refused() -> None:
    with pytest.raises(ConfigError, match="its date cannot be held still"):
        ChatTemplate.of(characters(chat="{% set f = '%d' %}{{ strftime_now(f) }}"))
    assert not ChatTemplate.of(characters(chat="{% if strftime_now is defined %}{% endif %}{{ 1 }}")).has_date


def dated_config(folder: Path, name: str) -> Any:
    from tests.helpers.resuming import run_config

    return run_config(folder, name, data=DataConfig(seed=5, chat=True))


def run_in_zone(config: Any, zones: list[str], **how: Any) -> dict[str, Any]:
    """A run, each rank in a time zone of its own."""
    from tests.helpers.resuming import run

    os.environ["TZ"] = zones[int(os.environ["RANK"])]
    time.tzset()
    try:
        return run(config, **how)
    finally:
        del os.environ["TZ"]
        time.tzset()


@pytest.mark.matrix(2)
def test_a_run_reads_the_same_prompts_on_another_day(tmp_path: Path, two_ranks: Ranks) -> None:
    """Ranks whose clocks say different days, a run that goes on on a third one; and a run of that day alone."""
    from transformers import AutoTokenizer

    save_models(tmp_path)
    for name in ("student", "teacher"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        tokenizer.chat_template = '{{ strftime_now("%d%m") }}{% for m in messages %}{{ m.content }}{% endfor %}'
        tokenizer.save_pretrained(tmp_path / name)
    first, later = ["XXX-23", "YYY+23"], ["ZZZ+23", "ZZZ+23"]
    whole = two_ranks(run_in_zone, dated_config(tmp_path, "whole"), first)
    cut = dated_config(tmp_path, "cut")
    two_ranks(_stopped, cut, first)
    again = two_ranks(run_in_zone, cut, later)
    two_ranks(run_in_zone, dated_config(tmp_path, "later"), later)
    for one, other in zip(whole, again, strict=True):
        assert other["outcome"] == "resumed"
        assert same(one["parameters"], other["parameters"])
    assert rows(tmp_path, "whole") == rows(tmp_path, "cut")
    assert rows(tmp_path, "whole") != rows(tmp_path, "later"), "the date is a part of the prompts"


def _stopped(config: Any, zones: list[str]) -> dict[str, Any]:
    return run_in_zone(replace(config), zones, stop_before=4)
