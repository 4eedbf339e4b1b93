"""A teacher on a rank of its own that reads groups of sequences while the student draws the next.

    python benchmarks/overlap.py [--groups 1 2 4 8] [--hidden 256] [--layers 8] [--steps 6]

Two ranks, one thread each: one trains the modular chain's student, one holds a larger teacher of random weights. For
each number of groups the median seconds of a step, of drawing, and of waiting for the teacher afterwards; and, of the
same recipe on the same ranks, with groups that are read only after the last one was drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from renio_megatron.models.shipped import model_directory

SEQUENCES, COMPLETION = 64, 48
TIMES = ("time/step_s", "time/rollout_s", "time/teacher_s")

# Python runs it at the start of every process: on ranks nothing is heard before all is drawn.
DEAF = """
import os

if "RANK" in os.environ:
    from renio_megatron.megatron.teacher.own_layout import OwnLayoutTeacher

    OwnLayoutTeacher.prefetch = lambda self, rollouts: None
"""


def save_teacher(directory: Path, hidden: int, layers: int) -> None:
    """A Qwen3 of random weights that reads the student's tokens."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    student = model_directory("modchain/student", "model")
    vocab_size = json.loads((student / "config.json").read_text())["vocab_size"]
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    for file in student.glob("tokenizer*"):
        shutil.copyfile(file, directory / file.name)


def run(folder: Path, name: str, groups: int, steps: int, *, is_deaf: bool) -> dict[str, float]:
    """Median of each of `TIMES` over the steps of a run but its first."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: modchain/student\noutput_dir: {folder / name}\n"
        f"teacher: {{model: {folder / 'teacher'}, ranks: dedicated}}\n"
        f"rollout: {{max_completion_length: {COMPLETION}, micro_batch_size: {SEQUENCES // groups}}}\n"
        f"train: {{train_iters: {steps + 1}, global_batch_size: {SEQUENCES}, micro_batch_size: 8, lr: 1.0e-6}}\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if is_deaf:
        (folder / "deaf").mkdir(exist_ok=True)
        (folder / "deaf" / "sitecustomize.py").write_text(DEAF)
        environment["PYTHONPATH"] = f"{folder / 'deaf'}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "renio_megatron.cli.main", "train", str(recipe)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    return {key: statistics.median(row[key] for row in rows) for key in TIMES}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    print(f"{SEQUENCES} sequences a step, completions of at most {COMPLETION}; teacher: {options.layers} layers of "
          f"{options.hidden}")  # fmt: skip
    print("groups  read                      step s  drawing s  waiting for the teacher s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher", options.hidden, options.layers)
        for groups in options.groups:
            for is_deaf in (True, False):
                found = run(folder, f"{groups} {is_deaf}", groups, options.steps, is_deaf=is_deaf)
                when = "after the last was drawn" if is_deaf else "while the next is drawn"
                print(f"{groups:6}  {when:24} {found[TIMES[0]]:7.3f}  {found[TIMES[1]]:9.3f}  {found[TIMES[2]]:9.3f}")


if __name__ == "__main__":
    main()
