"""SentencePiece: tokenizers read from `tokenizer.model` alone, and told where they differ from what was trained."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config import DataConfig
from renio_megatron.data.prompts import PromptStream
from renio_megatron.data.sources import build_source
from renio_megatron.errors import ConfigError
from renio_megatron.models.ends import Ends
from renio_megatron.models.tokenizer import check_same_tokenizer, conversion_notice, load_tokenizer, padding_id

sentencepiece = pytest.importorskip("sentencepiece")

NUM_PIECES = 512
SPACES_AS_THEY_ARE = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
TEXTS = ["Problem: 17 + 25?", "two  spaces ", "a\n\n  b ", "é ∑ 漢 \uff46", "", r"\boxed{\frac{1}{2}}", "1,234.50"]


def pieces(**settings: Any) -> bytes:
    """A model of 512 pieces, trained on sums and on words of random syllables."""
    numbers, model = random.Random(0), io.BytesIO()
    syllables = [first + second for first in "bdfglmnprstvwk" for second in "aeiou"]
    words = ["six", "seven", "nine", "plus", *("".join(numbers.choices(syllables, k=3)) for _ in range(400))]
    lines = [f"{' '.join(numbers.choices(words, k=8))} {numbers.randrange(1000)} + 7" for _ in range(2000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=NUM_PIECES,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        byte_fallback=True,
        minloglevel=2,
        **{"model_type": "bpe", **SPACES_AS_THEY_ARE, **settings},
    )
    return model.getvalue()


def saved(folder: Path, model: bytes, tokenizer_class: str | None = "LlamaTokenizer", **settings: Any) -> Path:
    """A model's directory, with SentencePiece's file and no tokenizer.json."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}))
    named = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **tokens, "add_bos_token": True, **settings}))
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), pieces())


def test_ids_are_those_of_sentencepiece(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    original = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert len(tokenizer) == NUM_PIECES == original.vocab_size()
    assert tokenizer.get_vocab() == {original.id_to_piece(index): index for index in range(NUM_PIECES)}
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == original.encode(text), text
    assert conversion_notice(tokenizer) is None
    assert (tokenizer.eos_token_id, padding_id(tokenizer)) == (2, 2), "no padding token: the end token"


def test_a_prompt_begins_once_and_a_completion_ends_once(directory: Path, tmp_path: Path) -> None:
    """Without a chat template: the beginning-of-text token, its pieces; the solution's pieces, the end token."""
    original = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    rows = [{"problem": "six plus nine", "solution": "is 15"}, {"problem": "<s>six plus nine", "solution": "is 15"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source="jsonl", path=str(tmp_path / "rows.jsonl"))
    stream = PromptStream(build_source(config, "train"), load_tokenizer(directory), config, with_completions=True)
    prompts = {prompt.record.problem: prompt for prompt in stream.batch(0, 2)}
    assert prompts["six plus nine"].student_ids == (1, *original.encode("six plus nine"))
    assert prompts["<s>six plus nine"].student_ids.count(1) == 1
    assert all(prompt.completion_ids == (*original.encode("is 15"), 2) for prompt in prompts.values())


def test_a_text_ends_a_completion_also_where_pieces_cut_it(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    ended = Ends((2,), ("seven plus", "漢")).in_text(tokenizer)
    assert ended is not None
    for text, end in (("six seven plus", "plus"), ("one 漢", "漢")):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        first = next(count for count in range(1, len(ids) + 1) if ended(ids[:count]))
        assert tokenizer.decode(ids[:first]).endswith(end) and not ended(ids[: first - 1])


def test_pieces_of_another_model_are_another_tokenizer(directory: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", pieces(split_digits=True))
    with pytest.raises(ConfigError, match="must share a tokenizer: token"):
        check_same_tokenizer(load_tokenizer(directory), load_tokenizer(other))


@pytest.mark.parametrize(
    ("tokenizer_class", "settings", "text"),
    [
        ("LlamaTokenizer", {"remove_extra_whitespaces": True}, "a  b"),
        ("LlamaTokenizer", {"normalization_rule_name": "nmt_nfkc"}, "x\n\n  y"),
        (None, {}, "What is 2 + 2?"),
    ],
)
def test_what_is_read_otherwise_than_it_was_trained_is_told(
    tmp_path: Path, tokenizer_class: str | None, settings: dict[str, Any], text: str
) -> None:
    tokenizer = load_tokenizer(saved(tmp_path / "model", pieces(**settings), tokenizer_class))
    notice = conversion_notice(tokenizer)
    assert notice is not None and f"of the text {text!r}" in notice and "tokenizer_class in tokenizer_con" in notice
    tokenizer.save_pretrained(tmp_path / "model")
    assert conversion_notice(load_tokenizer(tmp_path / "model")) is None, "a tokenizer.json is as its author has it"


def test_a_file_of_another_kind_is_no_notice(directory: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path / "model", (directory / "tokenizer.model").read_bytes()))
    (tmp_path / "model" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's
    assert conversion_notice(tokenizer) is None
