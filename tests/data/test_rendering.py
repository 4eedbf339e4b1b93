"""Prompts of real chat templates against texts written by hand: Qwen3's, SmolLM2's, one like R1-Distill's, and none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from renio_megatron.config import DataConfig
from renio_megatron.config.load import load_recipe
from renio_megatron.data.prompts import PromptStream
from renio_megatron.data.sources import build_source
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.models.ends import ends_of
from renio_megatron.models.tokenizer import conversion_notice, load_tokenizer, padding_id
from tests.data.test_prompts import characters
from tests.helpers.packages import fetch_qwen3_tokenizer, smollm2_directory
from tests.helpers.paths import ROOT

ROW = {"problem": "What is 2 + {x}?", "solution": "Add: {x} + 2.", "answer": "5"}

STUDENT = "Problem: What is 2 + {x}?\n\nAnswer in \\boxed{}."
TEACHER = "Problem: What is 2 + {x}?\n\nBegin\nAdd: {x} + 2.\nEnd\n\nAnswer in \\boxed{}."
VIEWS: dict[str, Any] = {
    "student_template": "Problem: {problem}\n\nAnswer in \\boxed{}.",
    "teacher_template": "Problem: {problem}\n\nBegin\n{solution}\nEnd\n\nAnswer in \\boxed{}.",
}


def rendered(folder: Path, tokenizer: Any, row: dict[str, Any] | None = None, **settings: Any) -> tuple[str, str]:
    """What student and teacher see of a record, decoded with special tokens; that these are tokens is checked."""
    found = stream_of(folder, tokenizer, row or ROW, **settings).batch(0, 1)[0]
    return tokenizer.decode(list(found.student_ids)), tokenizer.decode(list(found.teacher_ids))


def stream_of(folder: Path, tokenizer: Any, row: dict[str, Any], **settings: Any) -> PromptStream:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = DataConfig(**{"source": "jsonl", "path": str(folder / "rows.jsonl"), "chat": True, **settings})
    return PromptStream(build_source(config, "train"), tokenizer, config)


# Qwen3


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Qwen3's tokenizer and chat template."""
    return load_tokenizer(fetch_qwen3_tokenizer(tmp_path_factory.mktemp("qwen3")))


def asked(text: str, thought: str = "") -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{thought}"


CLOSED = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("student", "teacher", "thoughts"),
    [
        (None, None, ("", "")),
        (True, True, ("", "")),
        (False, None, (CLOSED, CLOSED)),
        (False, True, (CLOSED, "")),
        (None, False, ("", CLOSED)),
    ],
)
def test_qwen3(
    tmp_path: Path, qwen3: Any, student: bool | None, teacher: bool | None, thoughts: tuple[str, str]
) -> None:
    found = rendered(tmp_path, qwen3, **VIEWS, enable_thinking=student, teacher_enable_thinking=teacher)
    assert found == (asked(STUDENT, thoughts[0]), asked(TEACHER, thoughts[1]))


def test_qwen3_has_its_special_tokens_in_a_prompt(tmp_path: Path, qwen3: Any) -> None:
    (prompt,) = stream_of(tmp_path, qwen3, ROW, **VIEWS, enable_thinking=False).batch(0, 1)
    assert (prompt.student_ids[0], prompt.student_ids.count(151645)) == (151644, 1)
    assert [one for one in prompt.student_ids if one > 151664] == [151667, 151668]
    assert (qwen3.eos_token_id, padding_id(qwen3)) == (151645, 151643)


def test_qwen3_with_a_system_turn_and_several_questions(tmp_path: Path, qwen3: Any) -> None:
    turns = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2"},
        {"role": "user", "content": "2 + 2?"},
    ]
    row = {"messages": turns}
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(tmp_path, qwen3, row, student_system="Be brief.") == (expected, expected)
    system = {"role": "system", "content": "Be brief."}
    (prompt,) = stream_of(tmp_path, qwen3, {"messages": [system, *turns]}).batch(0, 1)
    ids = qwen3.apply_chat_template([system, *turns], add_generation_prompt=True, return_dict=False)
    assert list(prompt.student_ids) == list(ids)


@pytest.mark.parametrize("recipe", ["opsd-qwen3-1.7b-math", "opsd-qwen3-1.7b-code"])
def test_the_papers_views_on_qwen3(tmp_path: Path, qwen3: Any, recipe: str) -> None:
    """The student answers at once, with its thought closed; the teacher reads the solution, and may think."""
    config = load_recipe("train", ROOT / "examples" / "paper" / f"{recipe}.yaml").config.data
    names = {name: getattr(config, name) for name in ("student_template", "teacher_template", "enable_thinking")}
    student, teacher = rendered(tmp_path, qwen3, **names, teacher_enable_thinking=config.teacher_enable_thinking)
    assert student.startswith("<|im_start|>user\nProblem: What is 2 + {x}?\n\n")
    assert student.endswith(f"<|im_end|>\n<|im_start|>assistant\n{CLOSED}") and "Add:" not in student
    assert "]\nAdd: {x} + 2.\n[" in teacher and teacher.endswith("<|im_end|>\n<|im_start|>assistant\n")


# SmolLM2


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """SmolLM2's tokenizer."""
    return load_tokenizer(smollm2_directory())


SMOLLM2_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def test_smollm2(tmp_path: Path, smollm2: Any) -> None:
    found = rendered(tmp_path, smollm2, **VIEWS)
    assert found == (SMOLLM2_SYSTEM + asked(STUDENT), SMOLLM2_SYSTEM + asked(TEACHER))
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    found = rendered(tmp_path, smollm2, **VIEWS, student_system="Be brief.")
    assert found == (system + asked(STUDENT), SMOLLM2_SYSTEM + asked(TEACHER)), "a view has its own system turn"
    with pytest.raises(ConfigError, match="does not read enable_thinking"):
        rendered(tmp_path, smollm2, **VIEWS, enable_thinking=False)


def test_smollm2_without_a_chat_template(tmp_path: Path, smollm2: Any) -> None:
    """The text alone: this tokenizer writes no beginning-of-text token."""
    assert rendered(tmp_path, smollm2, **VIEWS, chat=False) == (STUDENT, TEACHER)


# R1-Distill's kind: the tokenizer writes a beginning-of-text token, and so does the template, which opens a thought


R1_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<U>{{ m.content }}{% else %}<A>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)


@pytest.fixture
def r1_like(tmp_path: Path) -> Any:
    tokenizer = characters(bos=True, chat=R1_LIKE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<U>", "<A>", "<think>", "</think>"]})
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    (tmp_path / "r1").mkdir()
    tokenizer.save_pretrained(tmp_path / "r1")
    (tmp_path / "r1" / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 1}))
    return load_tokenizer(tmp_path / "r1")


def test_one_like_r1_distills_begins_once_and_thinks(tmp_path: Path, r1_like: Any) -> None:
    assert r1_like("a").input_ids[0] == 0, "the tokenizer itself writes the beginning"
    (prompt,) = stream_of(tmp_path, r1_like, ROW, **VIEWS).batch(0, 1)
    for ids, text in ((prompt.student_ids, STUDENT), (prompt.teacher_ids, TEACHER)):
        assert r1_like.decode(list(ids)) == f"<s><U>{text}<A><think>\n"
        assert ids.count(0) == 1 and r1_like.convert_ids_to_tokens(list(ids[-3:])) == ["<A>", "<think>", "\n"]
    with pytest.raises(ConfigError, match="does not read enable_thinking"):
        rendered(tmp_path, r1_like, enable_thinking=True)


def test_a_tokenizer_that_transformers_reads_otherwise_than_its_file_is_told(tmp_path: Path, r1_like: Any) -> None:
    """transformers has a tokenizer of its own for Qwen2's kind; this one's file is of another."""
    assert conversion_notice(r1_like) is None
    (tmp_path / "r1" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    notice = conversion_notice(load_tokenizer(tmp_path / "r1"))
    assert notice is not None and "tokenizer.json as a Qwen2Tokenizer, which makes" in notice
    assert "tokenizer_class in tokenizer_config.json" in notice


def test_where_padding_is_the_end_a_completion_still_ends_by_it(tmp_path: Path, r1_like: Any) -> None:
    assert padding_id(r1_like) == r1_like.eos_token_id == 1
    assert ends_of(tmp_path / "r1", r1_like).token_ids == (1,)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    config = DataConfig(source="jsonl", path=str(tmp_path / "rows.jsonl"), chat=True)
    stream = PromptStream(build_source(config, "train"), r1_like, config, with_completions=True)
    completion = stream.batch(0, 1)[0].completion_ids
    assert completion is not None and completion[-1] == 1 and completion.count(1) == 1


# no template, and what is refused


def test_without_a_template_the_prompt_is_the_view(tmp_path: Path) -> None:
    assert rendered(tmp_path, characters(), **VIEWS, chat=False) == (STUDENT, TEACHER)
    assert rendered(tmp_path, characters(bos=True), **VIEWS, chat=False) == (f"<s>{STUDENT}", f"<s>{TEACHER}")
    with pytest.raises(ConfigError, match=r"data\.chat=true needs a tokenizer with a chat template"):
        rendered(tmp_path, characters(), **VIEWS)


@pytest.mark.parametrize(("solution", "found"), [(None, "no solution"), ("", "an empty solution"), (" \n", "an empty")])
def test_a_record_without_a_solution_is_named_before_the_start(
    tmp_path: Path, solution: str | None, found: str
) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: the record has {found}.*data\.teacher_template uses"):
        stream_of(tmp_path, characters(), {**ROW, "solution": solution}, **VIEWS, chat=False)


def test_a_prompt_is_whole_or_refused(tmp_path: Path) -> None:
    """Nothing of a prompt is cut: the longest that fits is whole, and one token more is refused."""
    length = len(TEACHER)
    assert rendered(tmp_path, characters(), **VIEWS, chat=False, max_prompt_length=length) == (STUDENT, TEACHER)
    with pytest.raises(DataError, match=f"the teacher's prompt has {length} tokens, more than data.max_prompt_length"):
        rendered(tmp_path, characters(), **VIEWS, chat=False, max_prompt_length=length - 1)
