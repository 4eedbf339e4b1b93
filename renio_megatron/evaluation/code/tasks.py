"""What is judged: a task with its tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["evalplus", "calls", "programs"]


@dataclass(frozen=True)
class Cases:
    """A group of tests that stand or fall together.

    Attributes:
        name: what messages call it, `base` or `plus`; empty where there is one group.
        inputs: for each test the arguments of a call (list or tuple), or the text of standard input.
        outputs: for each test what is expected; None where the task's canonical program says it.
    """

    name: str
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class CodeTask:
    """A programming problem with its tests.

    Attributes:
        name: what messages call it.
        kind: `evalplus` (calls, compared as EvalPlus does), `calls` (compared as values of JSON), `programs` (standard
            input and output).
        entry_point: the function, or method of a class `Solution`; None for whole programs.
        groups: the tests, in the order in which they are run.
        prompt: what a completion without the entry point continues; None where completions are whole.
        canonical: a right program; None where the tests hold the expected outputs.
        dataset: `humaneval` or `mbpp`, whose special tasks differ; empty otherwise.
        atol: absolute tolerance of floats; 0 is none, but 1e-6 for outputs that are floats.
        prelude: what is executed before the program, in its namespace.
        digest: names the inputs, the canonical program and the way of conversion; empty without a canonical program.
        test_s: time limit of one test in seconds; where there is a canonical program, its time counts instead.
        total_s: time limit of a group of tests in seconds.
        wrapped: an expected output may be a list that holds the output alone, as APPS and TACO write some.
    """

    name: str
    kind: Kind
    entry_point: str | None
    groups: tuple[Cases, ...]
    prompt: str | None = None
    canonical: str | None = None
    dataset: str = ""
    atol: float = 0.0
    prelude: str = ""
    digest: str = ""
    test_s: float = 6.0
    total_s: float = 300.0
    wrapped: bool = False
