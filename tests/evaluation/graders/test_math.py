"""The grader `math`: pairs from practice, MATH-500, what math-verify is asked, and the process that it runs in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from renio_megatron.errors import ConfigError
from renio_megatron.evaluation.graders import equality
from renio_megatron.evaluation.graders.equality import Equality, MathVerify
from renio_megatron.evaluation.graders.grader import NO_ANSWER, UNCLOSED_THINKING, Completion, Grader
from renio_megatron.evaluation.graders.math import math_grader, problem_of
from renio_megatron.types import Record
from tests.evaluation.graders import pairs
from tests.helpers.paths import SHARED


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerify]:
    verifier = MathVerify(limit_s=2.0)
    yield verifier
    verifier.close()


@pytest.fixture(scope="module")
def grader(verifier: MathVerify) -> Grader:
    return math_grader(verifier)


def written(text: str) -> str:
    return rf"So it is $\boxed{{{text[1:]}}}$." if text.startswith("=") else text


@pytest.mark.parametrize(("answer", "text", "is_right"), pairs.ALL)
def test_pairs_from_practice(grader, answer, text, is_right):
    verdict = grader.grade(Completion(written(text)), Record("", answer=answer))
    assert verdict.correct is is_right, verdict


def test_there_are_enough_pairs_of_both_kinds():
    assert len(pairs.ALL) >= 60
    assert min(sum(right for *_, right in pairs.ALL), sum(not right for *_, right in pairs.ALL)) >= 40


def test_what_the_verdict_says(grader):
    record = Record("", answer="4")
    assert grader.grade(Completion(r"\boxed{5}"), record).answer == "5"
    assert grader.grade(Completion("so 4"), record).reason == NO_ANSWER
    assert grader.grade(Completion(r"\boxed{4}", in_thinking=True), record).reason == UNCLOSED_THINKING
    assert "more than 2 s" in grader.grade(Completion(r"\boxed{2^{10^{10}}}"), record).reason


def test_equal_answers_vote_together(grader):
    assert grader.same_answer(r"\frac{1}{2}", "0.5") and grader.same_answer("2, 1", "1, 2")
    assert grader.same_answer("50%", "0.5") and grader.same_answer("0.5", "50%")
    assert not grader.same_answer("1", "2")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (r"\frac{1}{2", "braces"),
        ("$ $", "holds nothing"),
        ("word " * 300, "1500 characters"),
        (r"\text{no solution}", None),
        ("a long solution " * 100 + r"\boxed{4}", None),
    ],
)
def test_answers_that_cannot_be_read_are_told(answer, problem):
    found = problem_of(Record("", answer=answer))
    assert found is None if problem is None else problem in str(found)


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the benchmark files in ../shared/data")
class TestMath500:
    rows = (
        [json.loads(line) for line in (SHARED / "data" / "math500.jsonl").read_text().splitlines()]
        if (SHARED / "data").is_dir()
        else []
    )

    def test_answers_equal_themselves_in_a_box(self, grader):
        wrong = [
            row["answer"]
            for row in self.rows
            if not grader.grade(Completion(rf"\boxed{{{row['answer']}}}"), Record("", answer=row["answer"])).correct
        ]
        assert len(self.rows) == 500 and not wrong

    def test_solutions_are_right(self, grader):
        wrong = [
            row["answer"]
            for row in self.rows
            if not grader.grade(Completion(row["solution"]), Record("", answer=row["answer"])).correct
        ]
        assert not wrong

    def test_math_verify_agrees_about_the_answers(self, verifier):
        """A sample, so that it is not our rules alone that say so."""
        answers = [row["answer"].strip("$") for row in self.rows[::10]]
        asked = [(one, verifier.same(one, one)) for one in answers if r"\text" not in one]
        assert len(asked) > 40 and all(equal.same for _, equal in asked), asked

    def test_other_answers_are_wrong_by_our_rules(self):
        class Never:
            def same(self, expected: str, given: str) -> Equality:
                return Equality(False)

        same_answer = math_grader(Never()).same_answer  # type: ignore[arg-type]
        answers = sorted({row["answer"] for row in self.rows})[::3]
        found = {
            (one, other) for place, one in enumerate(answers) for other in answers[:place] if same_answer(one, other)
        }
        # By hand: the same number with and without its unit.
        assert found <= {("90^\\circ", "90"), ("30^\\circ", "30"), ("36^\\circ", "36"), ("120^\\circ", "120")}


class TestWorker:
    """math-verify's process."""

    def test_it_gives_up_at_its_limit_and_goes_on(self, verifier):
        started = time.monotonic()
        assert verifier.same("3", "2^{10^{10}}") == Equality(None, "math-verify took more than 2 s")
        assert time.monotonic() - started < 60
        assert verifier.same("x + 1", "1 + x").same

    def test_it_touches_no_timer_of_this_process(self, verifier):
        before = signal.setitimer(signal.ITIMER_REAL, 200.0)
        try:
            assert verifier.same("x + 2", "2 + x").same
            assert 100 < signal.getitimer(signal.ITIMER_REAL)[0] <= 200
        finally:
            signal.setitimer(signal.ITIMER_REAL, *before)

    def test_a_killed_worker_is_started_again(self, verifier):
        verifier.same("x", "y")
        os.kill(verifier.process_id, signal.SIGKILL)
        assert verifier.same("x + 1", "1 + x").same

    def test_it_ends_with_its_parent(self):
        program = (
            "import os, signal\n"
            "from renio_megatron.evaluation.graders.equality import MathVerify\n"
            "verifier = MathVerify()\n"
            "assert verifier.same('x + 1', '1 + x').same\n"
            "print(verifier.process_id, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
        worker = int(done.stdout)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                os.kill(worker, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
        raise AssertionError(f"worker {worker} is still there")

    def test_one_that_does_not_start_says_why(self, monkeypatch):
        monkeypatch.setattr(equality, "WORKER", "renio_megatron.no_such_module")
        with pytest.raises(ConfigError, match=r"no_such_module.*pip install math-verify"):
            MathVerify().same("1", "x")

    def test_grading_imports_neither_torch_nor_sympy(self):
        program = (
            "import sys\n"
            "from renio_megatron.evaluation.graders import Completion\n"
            "from renio_megatron.evaluation.graders.math import math_grader\n"
            "from renio_megatron.types import Record\n"
            "assert math_grader().grade(Completion(r'\\boxed{x+1}'), Record('', answer='1+x')).correct\n"
            "assert not {'torch', 'sympy', 'math_verify'} & set(sys.modules), 'too much is imported'\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
