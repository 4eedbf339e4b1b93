"""Records with too long prompts are left out, the same ones in every epoch and after a resumption, and counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from renio_megatron.config import DataConfig
from renio_megatron.data.prompts import LengthLimits, PromptStream
from renio_megatron.data.sources import build_source
from renio_megatron.errors import ConfigError, DataError
from tests.data.test_prompts import characters

LENGTHS = (3, 9, 2, 4, 12, 1, 5, 10, 6)


def stream(
    folder: Path, *, limit: int = 6, lengths: tuple[int, ...] = LENGTHS, repeats: int = 1, **more
) -> PromptStream:
    file = folder / "data.jsonl"
    rows = [{"problem": "x" * (length - 1) + str(number), "answer": 1} for number, length in enumerate(lengths)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(
        source="jsonl", path=str(file), eval_path=str(file), max_prompt_length=limit, **{"overlong": "skip", **more}
    )
    return PromptStream(
        build_source(config, "train"),
        characters(),
        config,
        completions_per_prompt=repeats,
        length_limits=LengthLimits(100),
    )


def problems(prompts) -> list[str]:
    return [prompt.record.problem for prompt in prompts]


def test_the_order_is_the_whole_one_without_them(tmp_path):
    """By hand: the order of the file with room for all, from which the three long ones are struck."""
    whole = problems(stream(tmp_path, limit=20).batch(0, 27))
    expected = [problem for problem in whole if len(problem) <= 6]
    assert len(expected) == 18 and len(set(expected)) == 6
    assert problems(stream(tmp_path).batch(0, 18)) == expected


def test_a_resumption_finds_the_same_ones(tmp_path):
    whole = stream(tmp_path).batch(0, 40)
    for start in (1, 5, 6, 13, 39):
        assert stream(tmp_path).batch(start, 40 - start) == whole[start:]


def test_each_is_counted_once_and_told_with_its_reason(tmp_path):
    found = stream(tmp_path)
    assert found.notices() == []
    assert len(found.distinct(50)) == 6
    (notice,) = found.notices()
    assert notice.startswith("data.overlong=skip leaves out 3 of the first 9 records of training; the first is ")
    assert "data.jsonl:" in notice and "the student's prompt has " in notice
    assert notice.endswith("max_prompt_length=6."), "why, and no advice that is taken already"
    found.batch(0, 60)
    assert found.notices() == [notice]


def test_the_start_looks_no_further_than_the_run(tmp_path):
    found = stream(tmp_path)
    assert len(found.distinct(2)) == 2
    assert found._selections[0]._looked < 9


def test_evaluation_problems_are_left_out_and_told_too(tmp_path):
    found = stream(tmp_path)
    assert [len(one) for one in problems(found.evaluation(4))] == [3, 2, 4, 1]
    assert [prompt.index for prompt in found.evaluation(4)] == [0, 1, 2, 3]
    assert "leaves out 2 of the first 6 records of evaluation" in found.notices()[-1]


def test_none_that_fits_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl:\d: .* So it is with all 9 records"):
        stream(tmp_path, lengths=(7,) * 9).batch(0, 1)
    with pytest.raises(DataError, match="So it is with all 9 records"):
        stream(tmp_path, lengths=(7,) * 9).distinct(4)


def test_an_endless_source_of_which_none_fits_is_an_error():
    config = DataConfig(max_prompt_length=1, overlong="skip")
    stream = PromptStream(build_source(config, "train"), characters(more="^=*"), config)
    with pytest.raises(DataError, match="So it is with the last 1000 records"):
        stream.batch(0, 1)


def test_given_completions_have_a_limit_of_the_whole(tmp_path):
    rows = [{"problem": "xyz", "solution": "s" * length} for length in (1, 5, 2)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source="jsonl", path=str(tmp_path / "data.jsonl"), overlong="skip")
    source = build_source(config, "train")
    found = PromptStream(source, characters(), config, with_completions=True, max_length=6)
    assert {len(one.completion_ids) for one in found.batch(0, 8)} == {2, 3}, "the end token counts"
    assert "prompt and completion have 9 tokens, more than the 6" in found.notices()[0]
    refusing = replace(config, overlong="refuse")
    with pytest.raises(DataError, match=r"prompt and completion have 9 tokens.*max_length"):
        PromptStream(source, characters(), refusing, with_completions=True, max_length=6).batch(0, 3)


def test_refused_by_default_with_the_way_out(tmp_path):
    with pytest.raises(DataError, match=r"data\.overlong=skip"):
        stream(tmp_path, overlong="refuse").batch(0, 9)
    with pytest.raises(ConfigError, match=r"data\.overlong must be one of refuse, skip"):
        DataConfig(overlong="cut")


def test_prompts_are_repeated_with_numbers_of_their_own(tmp_path):
    once, thrice = stream(tmp_path).batch(0, 7), stream(tmp_path, repeats=3).batch(0, 21)
    assert problems(thrice) == [problem for problem in problems(once) for _ in range(3)]
    assert [prompt.index for prompt in thrice] == list(range(21))
    assert [prompt.index for prompt in stream(tmp_path, repeats=3).distinct(4)] == [0, 3, 6, 9]
    assert stream(tmp_path, repeats=3).batch(4, 9) == thrice[4:13]
