"""Where the training loop gives up: the state is that of the last step, and what was not done is done later."""

from __future__ import annotations

from typing import Any

from renio_megatron.parallel.stopping import Abandoned
from tests.training.test_trainer import Checkpointer, trainer


class GivesUp:
    """Evaluates a step, or gives up where it is among `steps`."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.asked = set(steps), list[int]()

    def __call__(self, step: int) -> dict[str, float]:
        self.asked.append(step)
        if step in self.steps:
            raise Abandoned
        return {"eval/accuracy": step / 10}


def test_an_evaluation_that_is_given_up_is_done_when_the_run_goes_on():
    whole: list[dict[str, float]] = []
    trainer(evaluate=GivesUp(), evaluate_every=2, observers=[lambda _, row: whole.append(row)]).run()
    rows: list[dict[str, float]] = []
    settings: dict[str, Any] = {"evaluate_every": 2, "observers": [lambda _, row: rows.append(row)]}
    for step in (2, 4, 5):  # the last one is that of the end
        run = trainer(evaluate=GivesUp(step), checkpointer=Checkpointer(), **settings)
        rows.clear()
        assert run.run() == {}
        assert (run.stopped, run.step, [row["step"] for row in rows]) == (True, step, list(range(step)))
        saved, state = run.checkpointer.saved[-1]
        assert saved == step
        again, evaluate = None, GivesUp()
        again = trainer(evaluate=evaluate, checkpointer=Checkpointer((saved, state)), **settings)
        again.resume()
        last = again.run()
        assert not again.stopped and evaluate.asked == [each for each in (2, 4, 5) if each >= step]
        assert without_times(rows) == without_times(whole) and without_times([last])[0].items() <= rows[-1].items()
        assert all("untold" not in state for _, state in again.checkpointer.saved)


def test_draws_that_are_given_up_leave_the_state_of_the_step_before():
    run = trainer()
    real = run.algorithm.step

    def step(prompts: Any, number: int) -> dict[str, float]:
        if number == 4:
            raise Abandoned
        return real(prompts, number)

    run.algorithm.step = step
    assert run.run() == {}
    assert (run.stopped, run.step, run.cursor) == (True, 3, 12)
    assert [saved for saved, _ in run.checkpointer.saved] == [2, 3]
    assert run.checkpointer.saved[-1][1]["cursor"] == 12


def test_before_the_first_step_there_is_nothing_to_save():
    run = trainer(evaluate=GivesUp(0), evaluate_every=2)
    run.run()
    assert (run.stopped, run.step, run.checkpointer.saved) == (True, 0, [])


def without_times(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]
