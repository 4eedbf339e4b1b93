"""A tokenizer out of a GGUF file has the special tokens that the file names, whatever transformers made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

gguf = pytest.importorskip("gguf", reason="needs the extra `smollm2`")

TOKENS = ["<none>", "<first>", "<last>", "a"]


class Tokenizer:
    """As transformers 5.17 makes it of SmolLM2's file: the first token of a text also ends it, and nothing pads."""

    bos_token, eos_token, pad_token, unk_token = "<first>", "<first>", None, "<none>"

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return TOKENS[token_id]


def written(path: Path, **ids: int) -> Path:
    """A GGUF file that names these special tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(TOKENS)
    for name, token_id in ids.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_file_says_which_tokens_are_special(tmp_path):
    from renio_megatron.models.gguf_import import set_special_tokens

    tokenizer = Tokenizer()
    set_special_tokens(tokenizer, written(tmp_path / "all.gguf", bos=1, eos=2, pad=2, unk=0))
    found = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert found == ("<first>", "<last>", "<last>", "<none>")
    tokenizer = Tokenizer()
    set_special_tokens(tokenizer, written(tmp_path / "some.gguf", eos=3))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<first>", "a", None)
