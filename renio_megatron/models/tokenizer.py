"""Tokenizers: loading, padding, and comparison of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from renio_megatron.errors import ConfigError
from renio_megatron.models.architecture import Architecture

_MAX_NAMED = 3
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
