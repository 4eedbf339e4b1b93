"""The guides for one's own models and data: every recipe and command of theirs, on tiny models, in order."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.data.test_prompts import characters
from tests.helpers import warm
from tests.helpers.character_models import save_character_model
from tests.helpers.jobs import python_path
from tests.helpers.paths import ROOT
from tests.helpers.row_files import write_rows

GUIDES = ROOT / "docs" / "guides"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
ROWS = [{"problem": f"{n} + {n}?", "solution": f"Twice {n}.", "answer": str(2 * n)} for n in range(1, 9)]
SMALL = {
    "train.train_iters": "2",
    "train.global_batch_size": "8",
    "train.micro_batch_size": "2",
    "train.bf16": "false",
    "rollout.max_completion_length": "6",
}
"""What a test changes of the recipes: sizes and the precision."""
MORE = {
    "own-pair.md": {"evaluate.every": "2", "evaluate.samples": "4"},
    "from-nemo-rl.md": {"train.lr_warmup_iters": "1"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of characters, and the files that the guides name."""
    folder = tmp_path_factory.mktemp("guides")
    for seed, name in enumerate(("student", "teacher")):
        save_character_model(folder / "models" / name, characters(chat=TEMPLATE), seed=seed)
    data = folder / "data"
    for name in ("train.jsonl", "train.jsonl.gz", "train.parquet", "saved"):
        write_rows(data / name, ROWS)
    write_rows(data / "held_out.jsonl", ROWS[:4])
    write_rows(data / "odd.jsonl", [{"task": row["problem"], "answer": row["answer"]} for row in ROWS])
    turns = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["problem"]}] for row in ROWS]
    write_rows(data / "chats.jsonl", [{"messages": one} for one in turns])
    write_rows(
        data / "gsm8k.jsonl", [{"question": row["problem"], "answer": f"{row['solution']}\n#### 4"} for row in ROWS]
    )
    verl = [{"prompt": one, "reward_model": {"ground_truth": "4"}} for one in turns]
    write_rows(data / "verl.parquet", verl)
    write_rows(data / "hints.jsonl", [{**row, "teacher_prompt": f"{row['problem']} ({row['answer']})"} for row in ROWS])
    return folder


def commands_of(page: str, folder: Path) -> list[list[str]]:
    """A page's commands of its fences and tables; its recipes are written to the files that their first lines name."""
    text = (GUIDES / page).read_text()
    for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL):
        name = re.match(r"# (\S+\.yaml)", block)
        if name is not None:
            (folder / name[1]).write_text(block)
    fenced = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).splitlines()
    tabled = re.findall(r"`(renio \w+ [^`]+)` \|$", text, flags=re.MULTILINE)
    return [shlex.split(line) for line in (*fenced, *tabled) if line]


def run(command: list[str], folder: Path, *settings: str) -> str:
    assert command[0] == "renio"
    done = warm.run(
        [sys.executable, "-m", "renio_megatron.cli.main", *command[1:], *settings],
        env={**os.environ, "PYTHONPATH": python_path()},
        cwd=folder,
        timeout=200,
    )
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout + done.stderr


def small(command: list[str], page: str) -> list[str]:
    """The settings that make a command small; commands that only look have none."""
    if command[1] == "evaluate":
        return ["max_completion_length=6"]
    if command[1] == "train" or "--check" in command:
        found = SMALL | MORE.get(page, {})
        return [f"{key}={value}" for key, value in found.items()]
    return []


SAID = {
    "preview": "completions end at",
    "plan": "the largest rank needs",
    "check": "the first step's 8 completions",
    "train": "done: runs/",
    "export": "holds the ",
    "evaluate": "holds summary.json",
}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["own-pair.md", "self-distil.md", "from-trl.md", "from-nemo-rl.md"])
def test_each_command_of_a_job_runs(place: Path, page: str) -> None:
    commands = commands_of(page, place)
    assert len(commands) >= 3 and [one[1] for one in commands].count("train") == 1
    for command in commands:
        said = run(command, place, *small(command, page))
        assert SAID["check" if "--check" in command else command[1]] in said, (command, said[-1500:])
        if command[1] == "train":
            assert "the first step's 8 completions" in said
    exported = next(command[3] for command in commands if command[1] == "export")
    assert (place / exported / "config.json").is_file()


NOT_RUN = "openai/gsm8k"
"""A data set on the hub."""


def test_each_kind_of_data_is_shown(place: Path, capsys, monkeypatch) -> None:
    from renio_megatron.cli.main import main

    monkeypatch.chdir(place)
    commands = [command for command in commands_of("bring-your-data.md", place) if NOT_RUN not in " ".join(command)]
    assert len(commands) == 7
    for command in commands:
        assert main(command[1:]) == 0, command
        said = capsys.readouterr().out
        is_chat = "chats" in command[3] or "verl" in command[3]
        assert f"{'<s>Be brief.' if is_chat else ''}<u>" in said and "completions end at '</s>'" in said
        assert ("teacher sees the same" in said) == ("hints" not in command[3])


def test_the_page_of_the_first_step_shows_what_is_seen(tmp_path: Path) -> None:
    page = (GUIDES / "first-step.md").read_text()
    (command,) = re.findall(r"```bash\n(renio .*?)\n```", page)
    (shown,) = re.findall(r"```\n(the first step's .*?)```", page, flags=re.DOTALL)
    program, *arguments = shlex.split(command.replace("examples/", f"{ROOT}/examples/"))
    said = run([program, *arguments], tmp_path)
    assert "the first step, " not in said, "a canary warns"
    for line in shown.splitlines():
        name, _, text = line.strip().partition("  ")
        if name != "sampler":  # its last digits are the machine's
            assert line in said, (name, text)
    assert not list(tmp_path.iterdir())
