"""What two ranks show about teachers of each kind: stopped and gone on with, left unchanged, an average by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from renio_megatron.config import CheckpointConfig, DataConfig, EvaluateConfig, LoraConfig, TeacherConfig
from renio_megatron.megatron.checkpoint.directory import step_directory
from tests.helpers.resuming import error_of, run, run_config, tensors, train_config
from tests.helpers.training_cases import VOCAB_SIZE, layout_of
from tests.megatron.lora_run_cases import DISTRIBUTED, LORA

STEPS, CUT_OFF = 4, 3
"""Of an average by hand, and of a run that is cut off before its last one."""
LAYOUTS = {"TP2": layout_of(2), "PP2": layout_of(1, 2)}
TRAINED = {"full": LoraConfig(), "LoRA": replace(LORA, alpha=30.0)}
DECAY = 0.7
"""Low, so that a few steps move the average away from both the start and the student."""


def config_of(
    folder: Path, name: str, kind: str = "ema", trained: str = "full", steps: int = STEPS, **changes: Any
) -> Any:
    """Some steps with a teacher of one kind, a checkpoint after the second; `changes` replace sections."""
    teacher = {
        "separate": TeacherConfig(model=str(folder / "teacher")),
        "ema": TeacherConfig(kind="ema", ema_decay=DECAY),
    }.get(kind) or TeacherConfig(kind=kind)
    sections = {
        "model": str(folder / "deep"),
        "teacher": teacher,
        "data": DataConfig(seed=5, teacher_template="{problem}{solution}"),
        "train": train_config(train_iters=steps, lr=1e-2),
        "evaluate": EvaluateConfig(),
        "lora": TRAINED[trained],
    }
    return run_config(folder, name, **{**sections, **changes})


def built(config: Any, folder: Path) -> tuple[Any, Any, Any]:
    """(trainer without checkpoints, inputs, layout)."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    layout = start(config.parallel, seed=1)
    inputs = read_inputs(config)
    trainer = build_trainer(config, inputs, layout, folder / "unused")
    trainer.save_interval = 0
    return trainer, inputs, layout


def case_config(name: str, folder: Path, run_name: str) -> Any:
    """The settings of a case, "KIND, TRAINED, LAYOUT", for a run of some name."""
    kind, trained, layout = name.split(", ")
    sizes, _, model = layout.partition(" ")
    changes = {
        "parallel": {**LAYOUTS, "DP2": DISTRIBUTED}[sizes],
        "model": str(folder / f"deep{model and '_' + model}"),
    }
    return config_of(folder, run_name, kind, trained, CUT_OFF, **changes)


def run_whole(name: str, folder: Path) -> dict[str, Any]:
    """A case's whole run."""
    return run_and_look(case_config(name, folder, name))


def run_cut_off(name: str, folder: Path) -> dict[str, Any]:
    """The same, stopped before its last step and gone on with."""
    config = case_config(name, folder, f"{name}, cut off")
    run(config, stop_before=CUT_OFF)
    return run_and_look(config)


def run_and_look(config: Any) -> dict[str, Any]:
    """`resuming.run`, and of its teacher: which frozen parameters have changed, and the averages in the end."""
    import renio_megatron.runner.build as module

    build, kept = module.build_teacher, {}

    def build_and_look(*args: Any, **kwargs: Any) -> Any:
        kept["weights"] = (teacher := build(*args, **kwargs)).weights
        named = teacher.weights.part.named_parameters()
        kept["before"] = {name: one.detach().clone() for name, one in named if not one.requires_grad}
        return teacher

    module.build_teacher = build_and_look
    try:
        found = run(config)
    finally:
        module.build_teacher = build
    after = dict(kept["weights"].part.named_parameters())
    return found | {
        "frozen": len(kept["before"]),
        "changed": [name for name, values in kept["before"].items() if not torch.equal(after[name], values)],
        "averages": {str(number): value.clone() for number, (_, value) in enumerate(kept["weights"].averages)},
    }


def averages_by_hand(folder: Path, trained: str, changes: dict[str, Any]) -> dict[str, Any]:
    """An average from the weights of each step, in fp64, and a separate teacher that has them: both beside `ema`'s."""
    from renio_megatron.megatron.model.schedules import run_forward
    from renio_megatron.megatron.teacher.shared_layout import SharedLayoutTeacher
    from renio_megatron.megatron.teacher.weights import TeacherWeights
    from renio_megatron.runner.build import build_student
    from renio_megatron.training.algorithms.weighted_loss import WeightedLoss
    from renio_megatron.training.targets import HiddenStateTargets

    config = config_of(folder, "by hand", "ema", trained, **changes)
    trainer, inputs, layout = built(config, folder)
    algorithm = trainer.algorithm
    part, weights, learner = algorithm.learner.part, algorithm.teacher.weights, algorithm.learner
    copy_config = replace(config, parallel=replace(config.parallel, overlap_param_gather=False))
    copy_part = build_student(copy_config, inputs, layout)[
        0
    ].part  # another model, and what it holds is put there below
    copy = SharedLayoutTeacher(
        TeacherWeights(copy_part), config.train, config.head, temperature=config.loss.temperature, pad_id=inputs.pad_id
    )
    names = [name for name, _ in part.trained_parameters()]
    expected = {name: parameter.detach().double() for name, parameter in part.trained_parameters()}
    found: dict[str, Any] = {key: [] for key in ("average", "logp", "payload", "loss", "student loss", "rollouts")}
    found["trained"] = len(names)

    def student() -> dict[str, torch.Tensor]:
        part.sync_params()
        return {name: parameter.detach().clone() for name, parameter in part.trained_parameters()}

    score, update, sample = algorithm.teacher.score, learner.update, algorithm.sampler.sample

    def score_both(rollouts: Any, batches: Any) -> Any:
        before, pointers = student(), [p.data_ptr() for p in part.chunks[0].parameters()]
        mine = score(rollouts, batches)
        found["restored"] = found.get("restored", True) and all(
            torch.equal(value, before[name]) for name, value in student().items()
        )
        found["restored"] &= pointers == [p.data_ptr() for p in part.chunks[0].parameters()]
        with torch.no_grad():
            there = dict(copy_part.named_parameters())
            for name, value in expected.items():
                there[name].copy_(value)
        theirs = copy.score(rollouts, batches)
        found["logp"].append(float((mine.logp - theirs.logp).abs().max()))
        found["payload"] += [float((a - b).abs().max()) for a, b in zip(mine.payload, theirs.payload, strict=True)]
        found["scores"] = (mine, theirs)
        return mine

    def update_both(batches: Any, loss: Any, **kwargs: Any) -> Any:
        mine, theirs = found.pop("scores")
        losses = [loss]
        of_the_student = HiddenStateTargets(mine.logp, mine.payload, learner.part.head)
        for targets in (theirs, of_the_student):
            losses.append(WeightedLoss(targets, loss._sample, config.loss, config.head))
        values = [
            sum(
                float(x)
                for x in run_forward(part, batches, lambda i, b, rows, one=one: one(i, b, rows, part.head())[0])
            )
            for one in losses
        ]
        found["loss"].append(abs(values[0] - values[1]))
        found["student loss"].append(abs(values[0] - values[2]))
        return update(batches, loss, **kwargs)

    def sample_twice(prompts: Any, sampling_params: Any, *, rng_stream: Any, **_: Any) -> Any:
        mine = sample(prompts, sampling_params, rng_stream=rng_stream)
        with weights.activated():
            teachers = sample(prompts, sampling_params, rng_stream=rng_stream)
        own = flat(learner_scores(learner, mine))
        drawn = torch.cat([rollout.logp for rollout in mine])
        swapped = torch.cat([rollout.logp for rollout in teachers])
        differs = len(drawn) != len(swapped) or float((drawn - swapped).abs().max()) > 1e-4
        found["rollouts"].append((float((own - drawn).abs().max()), differs))
        return mine

    def learner_scores(learner: Any, rollouts: Any) -> torch.Tensor:
        return learner.score(learner.make_micro_batches(rollouts))["student_logp"]

    def flat(values: torch.Tensor) -> torch.Tensor:
        return values.cpu()

    algorithm.teacher.score, learner.update, algorithm.sampler.sample = score_both, update_both, sample_twice
    after = algorithm.teacher.after_update

    def after_and_compare(*, skipped: bool) -> None:
        after(skipped=skipped)  # before anything here asks for gathered parameters
        for name, value in student().items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * value.double()
        errors = [
            float((average - expected[name]).abs().max())
            for name, (_, average) in zip(names, weights.averages, strict=True)
        ]
        found["average"].append(max(errors))
        found["moved"] = max(
            float((value - average).abs().max())
            for value, (_, average) in zip(student().values(), weights.averages, strict=True)
        )

    algorithm.teacher.after_update = after_and_compare
    trainer.run()
    before = [average.clone() for _, average in weights.averages]
    weights.after_update(skipped=True)
    found["skipped changes"] = not all(torch.equal(a, b) for a, (_, b) in zip(before, weights.averages, strict=True))
    found["after an exception"] = _restored_after_an_exception(weights, student)
    return found


def _restored_after_an_exception(weights: Any, student: Any) -> bool:
    before = student()
    try:
        with weights.activated():
            inside = student()
            raise KeyError
    except KeyError:
        pass
    differed = any(not torch.equal(inside[name], value) for name, value in before.items())
    return differed and all(torch.equal(value, before[name]) for name, value in student().items())


def moved(folder: Path) -> dict[str, Any]:
    """The averages of two tensor ranks' checkpoint, loaded by two pipeline stages and saved again; and refusals."""
    found: dict[str, Any] = {}
    for trained in TRAINED:
        source = step_directory(folder / f"ema, {trained}, TP2" / "checkpoints", 2)
        config = config_of(
            folder,
            f"moved, {trained}",
            "ema",
            trained,
            parallel=LAYOUTS["PP2"],
            checkpoint=CheckpointConfig(load=str(source)),
        )
        trainer, _, _ = built(config, folder / f"moved, {trained}")
        step = trainer.resume()
        trainer.checkpointer.save(step, trainer._state())
        trainer.checkpointer.finish()
        again = step_directory(folder / f"moved, {trained}" / "unused", 2)
        one, other = (tensors(path, VOCAB_SIZE) for path in (source, again))
        keys = [key for key in one if key.startswith("teacher_average")]
        found[trained] = {
            "keys": len(keys),
            "same": all(torch.equal(one[key], other[key]) for key in keys),
            "differs from the student": any(
                not torch.equal(one[key], one[key.removeprefix("teacher_average.")]) for key in keys
            ),
        }
    plain = CheckpointConfig(load=str(step_directory(folder / "initial, full, TP2" / "checkpoints", 2)))
    found["no average"] = error_of(lambda: run(config_of(folder, "of initial", "ema", checkpoint=plain)))
    averaged = CheckpointConfig(load=str(step_directory(folder / "ema, full, TP2" / "checkpoints", 2)))
    found["to current"] = run(config_of(folder, "of ema", "current", checkpoint=averaged))["outcome"]
    trainer, _, _ = built(config_of(folder, "frozen", "current"), folder)
    found["nothing trained"] = error_of(lambda: _average_of_nothing(trainer.algorithm.learner.part))
    return found


def _average_of_nothing(part: Any) -> None:
    from renio_megatron.megatron.teacher.weights import MovingAverage

    for chunk in part.chunks:
        chunk.requires_grad_(False)
    MovingAverage(part, DECAY)
