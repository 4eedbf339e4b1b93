import re

import pytest
from transformers import AutoTokenizer, Qwen3Config

from renio_megatron.config import DataConfig
from renio_megatron.data.sources import modchain
from renio_megatron.errors import ConfigError
from renio_megatron.evaluation.graders import build_grader
from renio_megatron.types import Prompt, Rollout


def test_worked_example_by_hand():
    # 7+5=12 -> 2, 2*3=6, 6-8=-2 -> 8
    problem = modchain.write_problem(7, [("+", 5), ("*", 3), ("-", 8)])
    assert problem == modchain.Problem("^7+5*3-8=", "+52*36-88", "8")


def test_problems_are_right_and_complete():
    starts, operations, operands = set(), set(), set()
    for index in range(300):
        problem = modchain.make_problem(3, "train", index)
        match = re.fullmatch(r"\^(\d)((?:[-+*][2-9]){8})=", problem.prompt)
        assert match
        value, written = int(match[1]), ""
        for operation, operand in re.findall(r"([-+*])(\d)", match[2]):
            results = {"+": value + int(operand), "-": value - int(operand) + 10, "*": value * int(operand)}
            value = int(str(results[operation])[-1])  # the last decimal digit of a number >= 0
            written += operation + operand + str(value)
            operations.add(operation)
            operands.add(operand)
        starts.add(match[1])
        assert (problem.solution, problem.answer) == (written, str(value))
    assert (starts, operations, operands) == (set("0123456789"), set("+-*"), set("23456789"))


def test_problem_depends_on_all_arguments_and_on_nothing_else():
    again = modchain.make_problem(1, "train", 5)
    assert again == modchain.make_problem(1, "train", 5)
    others = [(2, "train", 5), (1, "eval", 5), (1, "train", 6)]
    assert again.prompt not in {modchain.make_problem(*arguments).prompt for arguments in others}


def test_splits_share_no_problem():
    train, held_out = ({modchain.make_problem(1, split, i).prompt for i in range(500)} for split in modchain.SPLITS)
    assert len(train) == len(held_out) == 500
    assert not train & held_out


@pytest.mark.parametrize(
    ("text", "finished", "right"),
    [
        ("+52*36-88", True, True),
        ("+52*36-88", False, False),
        ("+52*36-87", True, False),
        ("8+", True, False),
        ("", True, False),
    ],
)
def test_grade(text, finished, right):
    assert modchain.grade(text, "8", finished) is right


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("modchain")
    modchain.build_tokenizer(directory)
    Qwen3Config(vocab_size=17).save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def test_tokenizer_next_to_a_qwen3_config(tokenizer):
    assert len(tokenizer) == 17
    assert tokenizer.eos_token == "$"
    assert tokenizer.pad_token not in (None, "$")
    assert tokenizer.chat_template is None
    assert sorted(tokenizer.get_vocab().values()) == list(range(17))


def test_tokenizer_round_trip(tokenizer):
    text = "^7+5*3-8=+52*36-88$"
    token_ids = tokenizer(text).input_ids
    assert len(token_ids) == len(text)
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text[:-1]
    assert tokenizer("").input_ids == []


def test_grader_reads_the_tokens_before_the_end(tokenizer):
    source = _Answers()
    grader = build_grader(DataConfig(), source, tokenizer)
    prompt = Prompt(0, (1,), (1,), answer="8")

    def verdict(text, finished=True):
        return grader(Rollout(prompt, tuple(tokenizer(text).input_ids), finished=finished))

    assert verdict("+52*36-88$")
    assert not verdict("+52*36-88", finished=False)
    assert not verdict("+52*36-86$")
    assert not verdict("+52*36-88<pad>$"), "a padding token that was drawn is not invisible"
    assert not verdict("+52*36-88^$")
    assert not verdict("$")


def test_build_grader_refuses_what_it_cannot_grade(tokenizer):
    nothing = _Answers(has_answers=False)
    assert build_grader(DataConfig(grader="none"), _Answers(), tokenizer) is None
    assert build_grader(DataConfig(), nothing, tokenizer) is None
    with pytest.raises(ConfigError, match=r"data\.answer_key"):
        build_grader(DataConfig(grader="number"), nothing, tokenizer)
    with pytest.raises(ConfigError, match="modchain, number"):
        build_grader(DataConfig(grader="numbers"), _Answers(), tokenizer)
    with pytest.raises(ConfigError, match=r"data\.source=reasoning_gym"):
        build_grader(DataConfig(grader="reasoning_gym"), _Answers(), tokenizer)


class _Answers:
    name, grader, score = "modchain", "modchain", None

    def __init__(self, has_answers=True):
        self.has_answers = has_answers
