"""Tokenizers: loading, padding, and comparison of two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from renio_megatron.errors import ConfigError
from renio_megatron.models.architecture import Architecture

_MAX_NAMED = 3
_PROBES = ("What is 2 + 2?", "a  b", "x\n\n  y", "1,234.50 ", "\\boxed{\\frac{1}{2}}", "é ∑ \uff46")
"""Texts that conversions of a tokenizer may cut otherwise: spaces in a row and at the end, lines, digits, width. None
begins with a space: there transformers writes one piece less than SentencePiece for every model of Llama's kind."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(directory: str | Path) -> Any:
    """Loads the Hugging Face tokenizer of a model directory; never from the network.

    Raises:
        ConfigError: there is no tokenizer, it cannot be loaded, or it has no end token.
    """
    from transformers import AutoTokenizer

    # Without a vocabulary transformers may return an empty tokenizer of the class that config.json implies.
    if not any((Path(directory) / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(
            f"{str(directory)!r} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}). "
            "Save it next to the model by tokenizer.save_pretrained."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # json, OS, value and plain errors of the tokenizers library
        raise ConfigError(f"The tokenizer of {str(directory)!r} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"The tokenizer of {str(directory)!r} names no eos_token, so no completion could ever end.")
    return tokenizer


def conversion_notice(tokenizer: Any) -> str | None:
    """A sentence where a tokenizer cuts or writes a text otherwise than the file that it was made of; else None.

    transformers takes tokens and merges from the file, and how spaces, digits and other characters are treated from
    the class that the model's files name, or that it knows for the model's kind.
    """
    directory = Path(getattr(tokenizer, "name_or_path", ""))
    original = _original_of(directory)
    if original is None:
        return None
    file, encode, decode = original
    for text in _PROBES:
        try:
            expected = encode(text)
        except Exception:  # the tokenizers library raises plain Exception for what the file has no token for
            continue
        found = tokenizer(text, add_special_tokens=False).input_ids
        back = tokenizer.decode(expected, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for its, files in ((found, expected), (back, decode(expected))):
            if its != files:
                return (
                    f"transformers reads {file} as a {type(tokenizer).__name__}, which makes {its!r} of the text "
                    f"{text!r}; by the file itself it is {files!r}. If the model was trained by the file, name the "
                    "right tokenizer_class in tokenizer_config.json (TokenizersBackend takes tokenizer.json as it is)."
                )
    return None


def _original_of(directory: Path) -> tuple[Path, Callable[[str], list[int]], Callable[[list[int]], str]] | None:
    """(the file of a tokenizer, text -> token ids by that file, and back), without transformers; None: unknown."""
    file = directory / "tokenizer.json"
    if file.is_file():
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(str(file))
        fast.no_truncation()
        return (
            file,
            lambda text: fast.encode(text, add_special_tokens=False).ids,
            lambda ids: fast.decode(ids, skip_special_tokens=False),
        )
    file = directory / "tokenizer.model"
    if not file.is_file():
        return None
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):  # not SentencePiece's: tiktoken's files have this name, too
        return None
    return file, pieces.encode, pieces.decode


def padding_id(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's padding token, else its end token. No mask depends on it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def check_same_tokenizer(student: Any, teacher: Any) -> None:
    """Raises `ConfigError` unless every token of the student is the teacher's token of the same id.

    The teacher may have additional tokens, after or between the student's.
    """
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    differing = [(index, token) for token, index in student_vocab.items() if teacher_vocab.get(token) != index]
    if differing:
        index, token = min(differing)
        others = [other for other, other_index in teacher_vocab.items() if other_index == index]
        raise ConfigError(
            f"Student and teacher must share a tokenizer: token {index} is {token!r} for the student and "
            f"{others[0] if others else None!r} for the teacher (vocabularies of {len(student_vocab)} and "
            f"{len(teacher_vocab)} tokens). Choose two models of one family."
        )


def check_embedding(tokenizer: Any, directory: Path, architecture: Architecture) -> None:
    """Raises `ConfigError` where the tokenizer has ids without a row in the model's embedding.

    Args:
        tokenizer: the student's tokenizer.
        directory: the model's directory.
        architecture: the model's architecture.
    """
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= architecture.vocab_size)
    if beyond:
        named = ", ".join(f"{token!r} has the id {index}" for index, token in beyond[:_MAX_NAMED])
        more = f" (and {len(beyond) - _MAX_NAMED} more)" if len(beyond) > _MAX_NAMED else ""
        raise ConfigError(
            f"the student's tokenizer has tokens without a row in the embedding of {directory}, which has "
            f"{architecture.vocab_size}: {named}{more}. Resize that model's embedding (resize_token_embeddings), or "
            "take a tokenizer without them."
        )
