"""What a run does where `train.skip_nonfinite_steps` leaves steps out one after the other."""

from __future__ import annotations

import pytest

from renio_megatron.errors import NumericsError
from renio_megatron.types import Prompt
from tests.training.test_trainer import Algorithm, trainer


class Skipping(Algorithm):
    """Leaves out the steps that it is told to."""

    def __init__(self, left_out: set[int]) -> None:
        super().__init__()
        self._left_out = left_out

    def step(self, prompts: list[Prompt], step: int) -> dict[str, float]:
        return {**super().step(prompts, step), "train/skipped_frac": float(step in self._left_out)}


def test_steps_that_are_left_out_one_after_the_other_stop_the_run():
    ten = set(range(4, 14))
    run = trainer(algorithm=Skipping(ten), train_iters=40)
    with pytest.raises(NumericsError, match=r"steps 4 to 13 were all left out.*train\.skip_nonfinite_steps"):
        run.run()
    assert run.step == 13
    assert [step for step, _ in run.checkpointer.saved] == [2, 4, 6, 8, 10, 12]
    trainer(algorithm=Skipping(ten - {9}), train_iters=40).run()
    with pytest.raises(NumericsError, match="steps 1 to 3 were all left out"):
        trainer(algorithm=Skipping({1, 2, 3}), train_iters=3).run()
    trainer(algorithm=Skipping({1, 2}), train_iters=3).run()
