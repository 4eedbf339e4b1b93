"""One run on this rank, from its recipe to its finished directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch

from renio_megatron.config.schema import DistillationConfig, JobConfig, Recipe
from renio_megatron.errors import RunStopped, on_every_rank
from renio_megatron.megatron.runtime.initialize import bridge, start
from renio_megatron.parallel.collectives import on_main_rank
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.row_exchange import gather_rows
from renio_megatron.parallel.stopping import StopRequest
from renio_megatron.runner.build import build_trainer
from renio_megatron.runner.build_teachers import build_teacher_servers
from renio_megatron.runner.environment import describe_layers, describe_trained, describe_world
from renio_megatron.runner.inputs import RunInputs, read_inputs
from renio_megatron.runner.origins import origins
from renio_megatron.runner.preview import prompt_lines
from renio_megatron.runner.run_directory import RunDirectory
from renio_megatron.runner.run_log import ProgressMaker, RunLog
from renio_megatron.runner.signals import StopSignal
from renio_megatron.training.algorithms.distillation import Distillation
from renio_megatron.training.metrics.sinks import read_metrics

logger = logging.getLogger(__name__)


def run_recipe(
    recipe: Recipe,
    *,
    fresh: bool,
    title: str,
    progress: ProgressMaker | None = None,
    report: Callable[[str], None] = print,
) -> str:
    """Runs a recipe to its end, from the start or the newest checkpoint.

    Args:
        recipe: checked settings.
        fresh: move an earlier run in the same directory aside first.
        title: title of the progress bar.
        progress: shows the run's progress, on the first rank.
        report: called on the first rank with a line about the world, and with progress lines while weights are loaded.

    Returns:
        `finished` where the run was complete before this call, `resumed` or `new` where this call completed it.

    Raises:
        RenioError: its scope says whether every rank raises the same.
        RunStopped: on every rank, where any rank got SIGTERM or Ctrl-C; the state is saved.
    """
    run = _join(recipe, fresh)
    if run.layout.is_teacher_rank:
        return _serve_teachers(run)
    _report_start(run, report)
    begun = on_main_rank(run.layout, lambda: origins(run.config, run.inputs))
    state = on_main_rank(run.layout, lambda: run.directory.state(recipe, fresh, begun))
    if run.config.num_teacher_ranks:
        tell_teacher_ranks(state == "finished", run.layout)
    if state == "finished":
        return "finished"
    log = RunLog(run.config, run.directory, is_main=run.layout.is_main, title=title, progress=progress)
    return _train(run, log, lambda: run.directory.open(recipe, fresh, begun), report)


def look_at_first_step(recipe: Recipe, *, report: Callable[[str], None] = print) -> None:
    """Draws and scores the completions of a recipe's first step, and reports its canaries; nothing is written.

    Args:
        recipe: checked settings, of `renio train`.
        report: as in `run_recipe`.

    Raises:
        ConfigError: a fault that would stop the run. RenioError: as `run_recipe`.
    """
    run = _join(recipe, fresh=True)
    if run.layout.is_teacher_rank:
        _serve_teachers(run)
        return
    _report_start(run, report)
    if run.config.num_teacher_ranks:
        tell_teacher_ranks(False, run.layout)
    trainer = build_trainer(
        run.config,
        run.inputs,
        run.layout,
        run.directory.checkpoints,
        report=report if run.layout.is_main else None,
    )
    algorithm = trainer.algorithm
    assert isinstance(algorithm, Distillation)  # the command refuses others
    algorithm.look(trainer.next_prompts())
    algorithm.close()


@dataclass(frozen=True)
class _Run:
    """This rank's part of a run: settings, inputs, layout and output directory."""

    config: JobConfig
    inputs: RunInputs
    layout: ParallelLayout
    directory: RunDirectory


def _join(recipe: Recipe, fresh: bool) -> _Run:
    """Reads the inputs, which needs no other rank, and joins the world."""
    config, directory = recipe.config, RunDirectory(recipe.config.output_dir)
    inputs = _read(config, None if fresh else directory.date())
    layout = start(
        config.parallel,
        seed=config.train.seed,
        deterministic_mode=config.train.deterministic_mode,
        teacher_parallel=next((one.parallel for one in config.teachers if one.num_ranks), None),
        num_teacher_ranks=config.num_teacher_ranks,
    )
    if not layout.is_teacher_rank:
        inputs = on_the_same_day(config, inputs, layout)
    return _Run(config, inputs, layout, directory)


def _report_start(run: _Run, report: Callable[[str], None]) -> None:
    """Reports the world, the models and the first prompt on the first rank."""
    config, inputs = run.config, run.inputs
    line, warnings = describe_world(run.layout)
    with on_every_rank():
        line = f"{line}; {_models_line(config, run.layout)}"
    if not run.layout.is_main:
        return
    report(line)
    if config.longest_completion is not None or config.evaluate.every:
        report(f"completions end at {inputs.ends.describe(inputs.tokenizer)}")
    first = inputs.stream.batch(0, 1)[0]
    report("\n".join(prompt_lines(first, inputs.tokenizer, is_taught=bool(config.teachers))))
    for warning in (*warnings, *inputs.notices):
        logger.warning(warning)


def _train(run: _Run, log: RunLog, open_directory: Callable[[], Any], report: Callable[[str], None]) -> str:
    """Runs the remaining steps and finishes the run; returns `resumed` or `new`."""
    layout, stop = run.layout, _stop_request(run)
    trainer = build_trainer(
        run.config,
        run.inputs,
        layout,
        run.directory.checkpoints,
        log=log,
        stop=stop,
        report=report if layout.is_main else None,
    )
    # Nothing is written before the models are built: a directory with a config.yaml is a run that could start.
    on_main_rank(layout, open_directory)
    first = trainer.resume()
    with log.opened(first), StopSignal(stop, report if layout.is_main else None):
        metrics = trainer.run()
    trainer.algorithm.close()
    if trainer.stopped:
        stop.agree(layout)
        assert stop.number is not None
        raise RunStopped(trainer.step, stop.number)
    last = {"step": trainer.step, **(metrics or _last_row(run.directory))}
    on_main_rank(layout, lambda: run.directory.mark_finished(last))
    return "resumed" if first else "new"


def _read(config: JobConfig, date: str | None) -> RunInputs:
    """Reads the inputs, with `date` for chat templates; errors have the scope `ALL_RANKS`."""
    with on_every_rank():
        return read_inputs(config, None if date is None else datetime.fromisoformat(date))


def on_the_same_day(config: JobConfig, inputs: RunInputs, layout: ParallelLayout) -> RunInputs:
    """The inputs with the first rank's date, where prompts contain one; clocks and time zones may differ."""
    if inputs.date is None:
        return inputs
    date = on_main_rank(layout, lambda: inputs.date)
    return inputs if date == inputs.date else _read(config, date)


def _models_line(config: JobConfig, layout: ParallelLayout) -> str:
    """Backend and precision of the models, and the trained parameters of the student, in words."""
    of_their_own = [one for one in config.teachers if not one.shares_student]  # one precision for all of them
    text = describe_layers(
        config.precision,
        of_their_own[0].precision if of_their_own else None,
        layout.device,
        bf16=config.train.bf16,
        teacher_bf16=of_their_own[0].settings.bf16 if of_their_own else None,
        has_adapters=config.lora.r is not None,
    )
    if config.lora.r is None:
        return text
    is_teacher = any(one.kind == "initial" for one in config.teachers)
    return f"{text}; {describe_trained(config.lora)}{', and without them it is the teacher' if is_teacher else ''}"


def _serve_teachers(run: _Run) -> str:
    """Serves on a rank that only scores until the training ranks are done, which save; they hear of its signals."""
    assert isinstance(run.config, DistillationConfig)
    if tell_teacher_ranks(False, run.layout):
        return "finished"
    teachers = build_teacher_servers(run.config, run.inputs, run.layout)
    with StopSignal(_stop_request(run)):
        while _serve(teachers):
            pass
    return "new"


def _stop_request(run: _Run) -> StopRequest:
    """The request of all ranks, also of those that only score."""
    return StopRequest(bridge().store if run.config.num_teacher_ranks else None)


def _serve(teachers: Sequence[Any]) -> bool:
    """Serves one call of each teacher; False once all are closed."""
    answers = [teacher.serve() for teacher in teachers]
    return all(answers)


def tell_teacher_ranks(is_finished: bool, layout: ParallelLayout) -> bool:
    """Tells the ranks that only score whether the run is finished already; one collective over both worlds."""
    flags = gather_rows(torch.tensor([[int(is_finished)]], device=layout.device), bridge().axis)
    return any(int(flag) for flag in flags)


def _last_row(directory: RunDirectory) -> dict[str, Any]:
    """The last metrics of a run that was killed between its last step and its end."""
    rows = read_metrics(directory.metrics)
    return rows[-1] if rows else {}
