"""Several teachers in a run: one step through the trainer, beside the same step by transformers; whole runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from renio_megatron.config import DataConfig, ParallelConfig, TeacherConfig, TeacherParallelConfig
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.config.sections.combined_weighting import ProductWeighting
from renio_megatron.config.sections.report import RenioReportConfig
from renio_megatron.data.sources import build_source
from renio_megatron.data.sources.modchain import make_problem
from tests.fakes.strategies import GateWeighting, HardestWeighting
from tests.helpers.resuming import run, run_config, same, train_config
from tests.helpers.scoring_ranks import answer, on_scoring_ranks
from tests.helpers.training_cases import layout_of, one_step, recipe
from tests.megatron.lora_run_cases import DISTRIBUTED, LORA

WITH_SOLUTION = "{problem}{solution}"
MIXED = ("large", "itself", "small", "large", "shown", "small", "large", "itself")
"""The teachers of the batch's 8 sequences, in their order: the first half is the first of two data ranks'."""
SEED = 5


def routes(folder: Path) -> dict[str, TeacherConfig]:
    """Two models of different hidden sizes, one of which also reads the solution, and the student as it started."""
    return {
        "large": TeacherConfig(model=str(folder / "teacher")),
        "small": TeacherConfig(model=str(folder / "deep")),
        "shown": TeacherConfig(model=str(folder / "teacher"), template=WITH_SOLUTION),
        "itself": TeacherConfig(kind="initial", template=WITH_SOLUTION),
    }


def write_records(path: Path, teachers: Sequence[str]) -> DataConfig:
    """As many problems as `teachers`, in whose order the run uses them; the settings that read them."""
    problems = [make_problem(1, "train", index) for index in range(len(teachers))]
    data = DataConfig(source="jsonl", path=str(path), teacher_key="who", seed=SEED, grader="modchain")

    def write(named: Sequence[str]) -> None:
        records = [
            {"problem": one.prompt, "solution": one.solution, "answer": one.answer, "who": who}
            for one, who in zip(problems, named, strict=True)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    write([str(index) for index in range(len(teachers))])
    source = build_source(data, "train")
    order = [int(str(source.record(position).teacher)) for position in range(len(teachers))]
    write([who for _, who in sorted(zip(order, teachers, strict=True))])
    return data


def routed(folder: Path, teachers: Sequence[str] = MIXED, **changes: Any) -> DistillationConfig:
    """One step of 8 sequences; of the changes `teacher` holds settings of that section."""
    shared = changes.pop("teacher", {})
    name = f"{'-'.join(teachers)} {os.getpid()}.jsonl"  # each rank writes its own
    data = write_records(folder / name, teachers)
    return recipe(folder, data=data, teacher=TeacherConfig(routes=routes(folder), **shared), **changes)


def cases(folder: Path) -> dict[str, DistillationConfig]:
    """Name -> run, for 2 ranks."""
    packed = replace(recipe(folder).train, max_tokens_per_micro_batch=50)
    cp = ParallelConfig(context_parallel_size=2)
    apart = ("large",) * 4 + ("itself",) * 3 + ("small",)
    return {
        "TP2": routed(folder, parallel=layout_of(2)),
        "TP2, packed in one row": routed(
            folder, parallel=layout_of(2), train=replace(packed, max_tokens_per_micro_batch=400)
        ),
        "TP2 + SP, recompute": routed(
            folder, parallel=layout_of(2, sp=True), teacher={"payload_device": "recompute"}, model=str(folder / "tied")
        ),
        "PP2, host, packed": routed(folder, parallel=layout_of(1, 2), teacher={"payload_device": "host"}, train=packed),
        "DP2, packed": routed(folder, train=packed),
        "DP2, ranks that lack a teacher": routed(folder, apart),
        "CP2, packed": routed(folder, parallel=cp, train=packed),
        "CP2": routed(folder, parallel=cp, teacher={"offload": "host"}),
        "DP2, all have one": routed(folder, ("small",) * 8),
        "PP2, divergence and entropies weigh": routed(
            folder,
            parallel=layout_of(1, 2),
            weighting=ProductWeighting(factors=(HardestWeighting(), GateWeighting(above=2.3))),
            also_report=(RenioReportConfig(threshold=0.3, ceiling=1.5),),
        ),
        "DP2, entry clip": routed(folder, loss=replace(recipe(folder).loss, entry_clip=0.05)),
    }


def own_layout_cases(folder: Path) -> dict[str, DistillationConfig]:
    """Name -> run, for 4 ranks; those of `dedicated` have 2 that only score."""
    own = TeacherParallelConfig(tensor_model_parallel_size=2)
    alone = {"ranks": "dedicated", "parallel": own}
    apart = ("small",) * 4 + ("itself",) * 3 + ("small",)
    wide = TeacherParallelConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=1)
    return {
        "student PP2 x DP2, teachers TP4": routed(folder, parallel=layout_of(1, 2), teacher={"parallel": wide}),
        "student PP2 x DP2, teachers TP4, divergence weighs": routed(
            folder,
            parallel=layout_of(1, 2),
            teacher={"parallel": wide},
            weighting=HardestWeighting(),
            also_report=(RenioReportConfig(threshold=0.3, ceiling=1.5),),
        ),
        "dedicated, student TP2": routed(folder, parallel=layout_of(2), teacher=alone),
        "dedicated, student DP2, a teacher that nobody names": routed(folder, apart, teacher=alone),
    }


def run_cases(folder: Path) -> dict[str, Any]:
    """Every case of 2 ranks."""
    found = {}
    for name, config in cases(folder).items():
        found[name] = one_step(config, folder) | {"memory": _weights_loaded(config)}
    return found


def _weights_loaded(config: DistillationConfig) -> int:
    return len({one.weights_of for one in config.teachers})


def run_own_layouts(folder: Path) -> dict[str, Any]:
    """Every case of 4 ranks; the number of calls on ranks that only score."""
    together = {name: config for name, config in own_layout_cases(folder).items() if "dedicated" not in name}
    apart = {name: config for name, config in own_layout_cases(folder).items() if "dedicated" in name}
    found: dict[str, Any] = {name: one_step(config, folder) for name, config in together.items()}
    return found | on_scoring_ranks(
        apart,
        folder,
        train=lambda config: one_step(config, folder),
        serve=lambda teachers, _: (len(teachers), answer(teachers)),
    )


STEPS = 4


def run_runs(folder: Path) -> dict[str, Any]:
    """Runs of four steps with a separate teacher, an average and the student as it started, whole and cut off."""
    own = {**routes(folder), "average": TeacherConfig(kind="ema", ema_decay=0.7, template=WITH_SOLUTION)}
    del own["small"]
    data = write_records(folder / f"runs {os.getpid()}.jsonl", ("large", "average", "itself", "shown") * 8)
    found: dict[str, Any] = {}
    for name, changes in {
        "full, TP2": {},
        "LoRA, PP2": {"parallel": layout_of(1, 2), "lora": replace(LORA, alpha=30.0)},
        "full, DP2": {"parallel": DISTRIBUTED},
    }.items():
        sections = {
            "model": str(folder / "deep"),
            "teacher": TeacherConfig(routes=own),
            "data": data,
            "train": train_config(train_iters=STEPS, lr=1e-2),
            "evaluate": recipe(folder).evaluate,
            **changes,
        }
        found[name] = run_and_look(run_config(folder, f"routes, {name}", **sections))
        cut_off = run_config(folder, f"routes, {name}, cut off", **sections)
        run(cut_off, stop_before=STEPS)
        found[f"{name}, cut off"] = run_and_look(cut_off)
    return found


def run_and_look(config: DistillationConfig) -> dict[str, Any]:
    """`resuming.run`, and of its teachers: how many were built, changed frozen parameters, averages in the end."""
    import renio_megatron.runner.build as module

    build, kept = module.build_teacher, {}

    def build_and_look(*args: Any, **kwargs: Any) -> Any:
        kept["teachers"] = (teachers := build(*args, **kwargs))._teachers
        kept["before"] = {name: _frozen(one) for name, one in teachers._teachers.items()}
        return teachers

    module.build_teacher = build_and_look
    try:
        found = run(config)
    finally:
        module.build_teacher = build
    after = {name: _frozen(one) for name, one in kept["teachers"].items()}
    averages = [value.clone() for one in kept["teachers"].values() for _, value in one.averages]
    return found | {
        "teachers": list(kept["teachers"]),
        "frozen": {name: len(values) for name, values in kept["before"].items()},
        "unchanged": all(same(kept["before"][name], after[name]) for name in after),
        "averages": {str(number): value for number, value in enumerate(averages)},
    }


def _frozen(teacher: Any) -> dict[str, torch.Tensor]:
    named = teacher.weights.part.named_parameters()
    return {name: one.detach().clone() for name, one in named if not one.requires_grad}
