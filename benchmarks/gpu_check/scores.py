"""A first step's loss, weights and log-probabilities on the rollouts of `rollouts.jsonl`, as JSON on standard output:
`python -m gpu_check.scores MODEL... [--toy]`, on a GPU where torch sees one, in fp32 and in bf16.

Models: `modchain`, the two that ship; `smollm2`, of the shape of SmolLM2-135M with weights drawn from a seed on the
host, so that every device has the same, taught by another of the same shape.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROLLOUTS = Path(__file__).with_name("rollouts.jsonl")


def rollouts_of(model: str) -> list[Any]:
    """The committed rollouts of one model."""
    from renio_megatron.types import Prompt, Rollout

    lines = [json.loads(line) for line in ROLLOUTS.read_text(encoding="utf-8").splitlines()]
    mine = [line for line in lines if line["model"] == model]
    return [
        Rollout(Prompt(index, tuple(line["prompt"]), tuple(line["prompt"])), tuple(line["completion"]))
        for index, line in enumerate(mine)
    ]


def _parts(model: str, *, toy: bool) -> tuple[list[Any], Any]:
    """(architectures of student and teacher, what fills them)."""
    from renio_megatron.megatron.weights.pretrained import load_pretrained
    from renio_megatron.models.architecture import Architecture
    from renio_megatron.models.shipped import model_directory
    from step_bench.models import SHAPES, random_model

    if model == "smollm2":
        shape = SHAPES["smollm2-tiny" if toy else "smollm2-135m"]
        return [shape, shape], lambda part, role: random_model(part, {"student": 1, "teacher": 2}[role], on_host=True)
    folders = {role: model_directory(f"modchain/{role}", "model") for role in ("student", "teacher")}
    architectures = [Architecture.from_directory(folder) for folder in folders.values()]
    return architectures, lambda part, role: load_pretrained(part, folders[role], title=role)


def scores_of(model: str, *, bf16: bool, toy: bool) -> dict[str, Any]:
    """What a first step says, with a learning rate of 0."""
    from renio_megatron.config import LossConfig
    from step_bench.roles import Precision, Step, Workload

    rollouts = rollouts_of(model)
    architectures, fill = _parts(model, toy=toy)
    step = Step(
        *architectures,
        Workload(len(rollouts), 1, 1, max_tokens=2048),
        Precision(bf16=bf16),
        loss=LossConfig(temperature=1.1),
        fill=fill,
    )
    try:
        scores, taken = step.scores(rollouts)
        return {
            "device": str(step.layout.device.type),
            "loss": taken.metrics["loss"],
            "grad_norm": taken.metrics["grad_norm"],
            **{name: getattr(scores, name).tolist() for name in ("weights", "student_logp", "teacher_logp")},
        }
    finally:
        step.close()


def main(arguments: list[str]) -> None:
    """Prints every model's answers in both precisions, in the last line."""
    models, toy = [name for name in arguments if name != "--toy"], "--toy" in arguments
    found = {
        model: {name: scores_of(model, bf16=name == "bf16", toy=toy) for name in ("fp32", "bf16")} for model in models
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
