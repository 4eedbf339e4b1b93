"""The built-in task modchain: a chain of operations modulo 10, with its worked solution.

The prompt ``^7+5*3-8=`` asks for ((7 + 5) * 3) - 8; the completion copies every operation and writes the running value
modulo 10 after it, ``+52*36-88``, so its last digit is the answer. A prompt has `NUM_STEPS` operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

MODULUS = 10
NUM_STEPS = 8
START, END, PAD = "^", "$", "<pad>"
OPERATIONS = "+-*"
SYMBOLS = (*"0123456789", *OPERATIONS, "=", START, END, PAD)
SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Problem:
    """A prompt, its completion without the end token, and the answer, one digit.

    Example: ``Problem("^7+5*3=", "+52*36", "6")`` has two operations.
    """

    prompt: str
    solution: str
    answer: str


def write_problem(start: int, steps: list[tuple[str, int]]) -> Problem:
    """The problem with a start value and these (operation, operand) steps.

    >>> write_problem(7, [("+", 5), ("*", 3), ("-", 8)])
    Problem(prompt='^7+5*3-8=', solution='+52*36-88', answer='8')
    """
    value, prompt, solution = start, f"{START}{start}", ""
    for operation, operand in steps:
        if operation == "+":
            value = (value + operand) % MODULUS
        elif operation == "-":
            value = (value - operand) % MODULUS
        else:
            value = (value * operand) % MODULUS
        prompt += f"{operation}{operand}"
        solution += f"{operation}{operand}{value}"
    return Problem(f"{prompt}=", solution, str(value))


def make_problem(seed: int, split: str, index: int) -> Problem:
    """Problem number `index` of a split: a pure function of its arguments, seed and index at least 0.

    The start is uniform in 0..9, operations in + - *, operands in 2..9. The two `SPLITS` draw from disjoint streams.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))
    generator = np.random.Generator(np.random.Philox(sequence))
    start = int(generator.integers(MODULUS))
    operations = generator.integers(len(OPERATIONS), size=NUM_STEPS)
    operands = generator.integers(2, MODULUS, size=NUM_STEPS)
    return write_problem(start, [(OPERATIONS[o], int(d)) for o, d in zip(operations, operands, strict=True)])


def build_tokenizer(directory: str | Path) -> None:
    """Writes the task's tokenizer as a Hugging Face fast tokenizer: one token for each of the 17 `SYMBOLS`.

    It adds nothing to a text; decoding joins the symbols without spaces. Only the end token ``$`` and the padding token
    are special: a stray ``^`` in a completion stays visible to the grader. Any other character raises when encoded.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(SYMBOLS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD).save_pretrained(str(directory))
