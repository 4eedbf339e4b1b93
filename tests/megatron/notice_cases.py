"""Runs with a mistake put in, and what they say."""

from __future__ import annotations

import json
from pathlib import Path

from renio_megatron.config.load import load_recipe
from renio_megatron.models.shipped import QUICKSTART_RECIPE
from renio_megatron.types import Verdict
from tests.helpers.warned import messages_of

SMALL = (
    *("parallel.tensor_model_parallel_size=1", "train.global_batch_size=4", "train.micro_batch_size=4"),
    *("evaluate.every=0", "evaluate.samples=null", "checkpoint.save_interval=1000", "canaries=off"),
)
GRADED_BY = "data.grader=tests.megatron.notice_cases:"
PLANTED: dict[str, tuple[int, tuple[str, ...], str]] = {
    "rate": (13, ("train.lr=1000", "train.global_batch_size=16"), "the gradient was exactly 0 in steps"),
    "one text": (5, ("rollout.top_k=1", "data.source=jsonl"), "all completions of a step were equal in steps 1 to 5"),
    "cut": (3, ("rollout.max_completion_length=2",), "100.0% of the completions were cut in steps 1 to 3"),
    "always wrong": (
        50,
        (f"{GRADED_BY}wrong", "train.global_batch_size=2", "train.micro_batch_size=2"),
        "no completion was right in steps 1 to 50",
    ),
    "always right": (
        50,
        (f"{GRADED_BY}right", "train.global_batch_size=2", "train.micro_batch_size=2"),
        "every completion was right in steps 1 to 50",
    ),
    "unread": (5, (f"{GRADED_BY}unread",), "no grader read an answer in any completion in steps 1 to 5"),
    "broken grader": (1, (f"{GRADED_BY}broken", "data.grader_errors=count_wrong"), "the grader failed on 100.0%"),
    "threshold": (5, ("weighting.threshold=70", "weighting.ceiling=75"), "no token was pivotal in steps 1 to 5"),
    "ceiling": (5, ("weighting.threshold=-30", "weighting.ceiling=-5"), "every raw weight was at the ceiling"),
    "group of one": (
        5,
        ("weighting.normalize=group", "weighting.group_size=1", "weighting.cap=null", "weighting.threshold=-9"),
        "all sequences had the same weight in steps 1 to 5, so weighting=renio changes nothing",
    ),
    "cap": (20, ("weighting.cap=1.01", "weighting.threshold=-9"), "the cap cut "),
    "entry clip": (
        40,
        ("loss.entry_clip=1e-6", "train.global_batch_size=8"),
        "loss.entry_clip=1e-06 and loss.entry_floor=0 left ",
    ),
}
"""Name -> (steps, settings, how what is said begins)."""


def wrong(completion, record):
    return Verdict(False, "its answer")


def right(completion, record):
    return Verdict(True, "its answer")


def unread(completion, record):
    return Verdict(False)


def broken(completion, record):
    raise KeyError("answer")


def said(folder: Path, name: str) -> list[str]:
    """What a run with this mistake says."""
    from renio_megatron.runner.run import run_recipe

    steps, settings, _ = PLANTED[name]
    given = {text.partition("=")[0]: text for text in (*SMALL, *settings)}  # those of the mistake come last
    if given.get("data.source") == "data.source=jsonl":
        row = {"problem": "^3+4=", "solution": "7", "answer": "7"}
        (folder / "same.jsonl").write_text((json.dumps(row) + "\n") * 8)
        given |= {"data.path": f"data.path={folder}/same.jsonl"}
    given |= {"train.train_iters": f"train.train_iters={steps}", "output_dir": f"output_dir={folder / name}"}
    recipe = load_recipe("train", QUICKSTART_RECIPE, list(given.values()))
    with messages_of("renio_megatron.training.notices.observer") as found:
        run_recipe(recipe, fresh=False, title=name)
    return found
