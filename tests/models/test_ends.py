"""What ends a completion: as transformers' `generate` has it, the tokenizer's end token, and what the recipe adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from renio_megatron.config import RolloutConfig
from renio_megatron.errors import ConfigError
from renio_megatron.evaluation.graders import Grader
from renio_megatron.evaluation.graders.number import grade_number
from renio_megatron.evaluation.grading import RolloutGrader
from renio_megatron.models.ends import Ends, differing_ends, ends_of
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.types import Prompt, Record, Rollout
from tests.data.test_prompts import characters
from tests.helpers.multiprocess import Ranks

EOS = 1  # of `characters`


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are single characters, every parameter random."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = characters()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


FILES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    # generation_config.json (None: not there), changes of config.json
    "both": ({"eos_token_id": [7, 9]}, {"eos_token_id": 5}),
    "one token": ({"eos_token_id": 7}, {"eos_token_id": 5}),
    "the first without": ({"temperature": 0.5}, {"eos_token_id": 5}),
    "null": ({"eos_token_id": None}, {"eos_token_id": 5}),
    "config.json alone": (None, {"eos_token_id": [5, 6]}),
    "config.json, one": (None, {"eos_token_id": 6}),
    "neither": (None, {"eos_token_id": None}),
    "texts": ({"eos_token_id": 7, "stop_strings": ["END", "\n\n"]}, {}),
    "a text": ({"stop_strings": "END"}, {}),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_transformers_reads_them(name: str, directory: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoModelForCausalLM

    generation, changes = FILES[name]
    copy = shutil.copytree(directory, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "generation_config.json").unlink()
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    theirs = AutoModelForCausalLM.from_pretrained(copy).generation_config
    tokens = theirs.eos_token_id
    listed = tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
    strings = theirs.stop_strings
    found = ends_of(copy, characters())
    assert found.token_ids == tuple(sorted({EOS, *listed}))
    assert found.strings == tuple([strings] if isinstance(strings, str) else strings or ())
    more = ends_of(copy, characters(), [30], ["!", "END"])
    assert set(more.token_ids) == {*found.token_ids, 30} and set(more.strings) == {*found.strings, "!", "END"}


@pytest.mark.parametrize(
    "text", ["[2]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": true}', '{"stop_strings": [3]}', "[" * 99_999]
)
def test_a_file_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json cannot be read") as caught:
        ends_of(tmp_path, characters())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stop_token_ids": [3, -1]}, "token ids, from 0 on"),
        ({"stop_strings": ["a", ""]}, "an empty text ends every completion"),
    ],
)
def test_stops_that_cannot_be_meant_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RolloutConfig(**settings)


def test_a_token_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="and none of id 5000"):
        ends_of(tmp_path, characters(), [5000])


def test_they_are_said_in_words() -> None:
    tokenizer = characters()
    two, newline = tokenizer.convert_tokens_to_ids(["2", "\n"])
    ends = Ends((EOS, two), ("END", "\n\n"))
    assert ends.describe(tokenizer) == f"'</s>' (1), '2' ({two}), the text 'END', the text '\\n\\n'"
    base, instruct = Ends((EOS,)), Ends((EOS, newline))
    assert differing_ends(base, base, tokenizer, "the teacher") is None
    assert differing_ends(instruct, base, tokenizer, "the teacher") is None
    assert differing_ends(base, Ends((EOS, 50_000)), tokenizer, "the teacher") is None, "no token of the student's"
    sentence = differing_ends(base, instruct, tokenizer, "the teacher math")
    assert sentence is not None
    for words in ("end at '</s>' (1)", "the teacher math also ends", f"Set rollout.stop_token_ids=[{newline}]"):
        assert words in sentence


def test_texts_are_found_wherever_tokens_cut_them() -> None:
    tokenizer = characters()
    found = Ends((EOS,), ("END", "</s>\n")).in_text(tokenizer)
    assert found is not None and Ends((EOS,)).in_text(tokenizer) is None

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    assert found(ids("a" * 1000 + "END"))
    assert not found(ids("EN D")) and not found(ids("END" + "x" * 100))  # which would have ended it before
    assert found([*ids("END"), *ids("...")])  # a token may bring more than the text
    assert found([EOS, *ids("\n")]), "special tokens are written out"


def by_transformers(directory: Path, prompts: list[list[int]], strings: list[str]) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), characters()
    found = []
    for prompt in prompts:
        more = {"stop_strings": strings, "tokenizer": tokenizer} if strings else {}
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=EOS, **more)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def by_us(directory: Path, prompts: list[list[int]], strings: list[str], tensor: int, pipeline: int) -> list[Rollout]:
    from renio_megatron.config import TrainConfig
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.megatron.student.sampler import MegatronSampler
    from renio_megatron.megatron.weights.hf import load_weights
    from renio_megatron.models.architecture import Architecture
    from renio_megatron.types import SamplingParams
    from tests.helpers.training_cases import layout_of

    parallel = layout_of(tensor, pipeline)
    architecture = Architecture.from_directory(directory)
    part = build_model(
        architecture, start(parallel, seed=0), parallel, TrainConfig(), vocab_size=architecture.vocab_size
    )
    load_weights(part, directory)
    ends = Ends((EOS,), tuple(strings))
    sampler = MegatronSampler(
        part, seed=1, temperature=1.0, stop_ids=ends.token_ids, pad_id=0, ends_in_text=ends.in_text(characters())
    )
    asked = [Prompt(number, tuple(prompt), ()) for number, prompt in enumerate(prompts)]
    return sampler.sample(asked, SamplingParams(0.0, None, None, 24), rng_stream=(1,))


@pytest.mark.matrix(2)
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)])
def test_a_text_ends_a_completion_where_transformers_ends_it(
    tensor: int, pipeline: int, directory: Path, two_ranks: Ranks
) -> None:
    tokenizer = characters()
    prompts = [[5, 9, 40], [60], [33, 21, 8, 77, 12]]
    free = by_transformers(directory, prompts, [])
    # Of each completion two neighbours, from another place: some texts are met early, some late.
    strings = [tokenizer.decode(ids[place : place + 2]) for ids, place in zip(free, (3, 9, 0), strict=True)]
    expected = by_transformers(directory, prompts, strings)
    assert any(len(ended) < len(whole) for ended, whole in zip(expected, free, strict=True))
    for rollouts in two_ranks(by_us, directory, prompts, strings, tensor, pipeline):
        assert [list(rollout.completion_ids) for rollout in rollouts] == expected
        for rollout in rollouts:
            text = tokenizer.decode(list(rollout.completion_ids))
            assert rollout.ended_by_string == any(one in text for one in strings)
            assert rollout.finished == (rollout.ended_by_string or rollout.completion_ids[-1] == EOS)


def test_what_ended_by_a_text_is_graded_whole() -> None:
    tokenizer = characters()
    grade = RolloutGrader(Grader("number", grade_number), tokenizer, errors="raise", layout=ParallelLayout())
    prompt = Prompt(0, (5,), (5,), Record("", answer="42"))

    def verdict(text: str, **how: bool) -> bool | None:
        ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
        return grade([Rollout(prompt, ids, **how)])[0].correct

    assert verdict("it is 42", ended_by_string=True)
    assert not verdict("it is 42"), "the last token is an end token, and no part of the answer"
    assert verdict("it is 42.")
    assert not verdict("it is 42", finished=False)
