import re

import pytest
from transformers import AutoTokenizer, Qwen3Config

from renio_megatron.data.sources import modchain


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
