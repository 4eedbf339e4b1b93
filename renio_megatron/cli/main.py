"""The `renio` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from renio_megatron import __version__
from renio_megatron.cli import evaluate
from renio_megatron.cli.slurm import rank_variables
from renio_megatron.errors import CheckpointError, ConfigError, RenioError

INTERRUPTED = 130

_DESCRIPTION = """\
On-policy distillation on Megatron-core: a student writes, a teacher scores every
token, and ReNIO weighs each sequence by what the log ratios say about it.

commands:
  quickstart         the whole method on tiny models that ship with the package (CPU, minutes)
  train              distill a teacher into a student, as a recipe says
  sft                fine-tune on given completions, as a recipe says
  preview            show the first prompts as student and teacher see them, and what ends completions
  plan               show what a recipe will hold in each GPU's memory, without running it
  evaluate           grade a model, a run or a server on benchmarks: avg@k, pass@k, majority, intervals
  export             write a checkpoint of a run as a Hugging Face model directory
  doctor             look at versions, devices, links and the loss in a layout before a run
  compare-precision  show what FP8 does to a recipe's weights and gradient, on the same rollouts
"""
_EPILOG = """\
examples:
  renio quickstart
  renio train recipe.yaml train.lr=1e-5 weighting=uniform --nproc 4
  renio preview recipe.yaml --prompts 2
  renio plan recipe.yaml --gpus 8 --memory 80
  renio export runs/mine models/mine

`renio COMMAND --help` tells more. Under torchrun or srun, train and sft join their ranks.
"""
_RECIPE_EPILOG = """\
A run that was cut off continues from its newest checkpoint when the same command is given again. Ctrl-C and SIGTERM
give up what is drawn or evaluated, or finish the step, and save first; the exit code is then 130 or 143. A finished run
continues with a larger train.train_iters.

example:
  renio {kind} recipe.yaml train.lr=1e-5 output_dir=runs/mine --nproc 2
"""
_EXPORT_DESCRIPTION = """\
Write a checkpoint as a Hugging Face model directory; of a run with adapters (lora.r) as a PEFT adapter directory.
"""
_PLAN_EPILOG = """\
The exit code is 0 where the run fits or no --memory is given, 3 where it does not fit, and 2 for a mistake. Where it
does not fit, the last line is the shortest list of settings with which it does.

example:
  renio plan recipe.yaml train.micro_batch_size=2 --gpus 8 --memory 80
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 for a `RenioError`, 3 for a plan that does not fit, or the failed rank's code.

    It is 130 for Ctrl-C, and 143 for SIGTERM, after either of which the same command resumes the run.

    RENIO_TRACEBACK=1 shows the traceback of a `RenioError`.
    """
    parser = _parser()
    arguments, extra = parser.parse_known_args(argv)
    unknown = (
        extra
        if arguments.command not in ("train", "sft", "preview", "plan", "doctor", "compare-precision", "evaluate")
        else [text for text in extra if text.startswith("-")]
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.command is None:
        parser.print_help()
        return 0
    arguments.extra = extra
    try:
        if arguments.command != "export":
            os.environ.update(rank_variables(os.environ))
        return arguments.run(arguments)
    except RenioError as error:
        if os.environ.get("RENIO_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="renio", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw, usage="renio COMMAND ..."
    )
    parser.add_argument("--version", action="version", version=f"renio {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help=argparse.SUPPRESS)

    for kind, what in (("train", "Distill a teacher into a student."), ("sft", "Fine-tune on given completions.")):
        usage = f"renio {kind} RECIPE [key=value ...] [--nproc N] [--fresh]"
        epilog = _RECIPE_EPILOG.format(kind=kind)
        command = commands.add_parser(kind, description=what, epilog=epilog, formatter_class=raw, usage=usage)
        _add_recipe(command)
        command.add_argument(
            "--nproc", type=_positive, metavar="N", help="ranks to start on this machine (default: one model copy)"
        )
        _add_fresh(command)
        command.set_defaults(run=_run_recipe)

    command = commands.add_parser(
        "plan",
        description="Say what a distillation recipe will hold in the memory of each rank. Nothing is run or allocated; "
        "of the models only config.json is read.",
        epilog=_PLAN_EPILOG,
        formatter_class=raw,
        usage="renio plan RECIPE [key=value ...] [--gpus N] [--memory GIB]",
    )
    _add_recipe(command)
    command.add_argument("--gpus", type=_positive, metavar="N", help="ranks of the job (default: the fewest that do)")
    command.add_argument("--memory", type=_gib, metavar="GIB", help="memory of each GPU in GiB (default: no verdict)")
    command.set_defaults(run=_run_plan)

    _add_preview(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_doctor(commands)
    _add_compare_precision(commands)
    what = "The whole method on tiny models, with 2 ranks on the CPU."
    usage = "renio quickstart [--output-dir DIR] [--fresh]"
    command = commands.add_parser("quickstart", description=what, usage=usage)
    command.add_argument(
        "--output-dir", metavar="DIR", default="runs/quickstart", help="directory to write (default: %(default)s)"
    )
    _add_fresh(command)
    command.set_defaults(run=_run_quickstart)
    return parser


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="YAML file with the settings of the run")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")


def _add_preview(commands: Any) -> None:
    command = commands.add_parser(
        "preview",
        description="Show the first prompts of a recipe of `renio train` or `renio sft` as the models see them, with "
        "special tokens, answers, lengths, and what ends completions. No weights are read, but with --check: then the "
        "models draw and score the completions of the first step, as `renio train` would, and nothing is trained.",
        usage="renio preview RECIPE [key=value ...] [--prompts N] [--json | --resolved | --check [--nproc N]]",
    )
    _add_recipe(command)
    command.add_argument("--prompts", type=_positive, metavar="N", default=3, help="how many (default: %(default)s)")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="write JSON, token ids included")
    form.add_argument("--resolved", action="store_true", help="write the settings as one recipe")
    form.add_argument("--check", action="store_true", help="look at the first step of a recipe of `renio train`")
    command.add_argument("--nproc", type=_positive, metavar="N", help="with --check: ranks to start on this machine")
    command.set_defaults(run=_run_preview)


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        description=evaluate.DESCRIPTION,
        epilog=evaluate.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="renio evaluate TARGET --benchmark NAME|PATH [--benchmark ...] [--n K] [--limit N] [key=value ...]",
    )
    evaluate.add_arguments(command, _positive)
    command.set_defaults(run=_run_evaluate)


def _add_export(commands: Any) -> None:
    usage = "renio export RUN_DIR DESTINATION [--step K] [--merge] [--model PATH]"
    command = commands.add_parser("export", description=_EXPORT_DESCRIPTION, usage=usage)
    command.add_argument("run_dir", metavar="RUN_DIR", help="directory of the run (its output_dir)")
    command.add_argument("destination", metavar="DESTINATION", help="directory to write")
    command.add_argument("--step", type=_positive, metavar="K", help="checkpoint to write (default: the newest)")
    command.add_argument("--merge", action="store_true", help="write the whole model, the adapters in its weights")
    command.add_argument("--model", metavar="PATH", help="the run's model, where it was moved")
    command.set_defaults(run=_run_export)


def _add_doctor(commands: Any) -> None:
    usage = "renio doctor [RECIPE] [key=value ...] [--nproc N]"
    what = (
        "One line per check of versions, devices, groups, the bandwidth of each group, and the loss against a dense "
        "one in fp64. The exit code is 0 where all are good, else 1."
    )
    epilog = "keys without a recipe: parallel.*, bf16\nexample: renio doctor parallel.tensor_model_parallel_size=2"
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser("doctor", description=what, epilog=epilog, formatter_class=raw, usage=usage)
    command.add_argument("words", metavar="RECIPE, key=value", nargs="*", help="a recipe of `renio train`; settings")
    command.add_argument("--nproc", type=_positive, metavar="N", help="ranks to start here (default: one model copy)")
    command.set_defaults(run=_run_doctor)


def _add_compare_precision(commands: Any) -> None:
    what = (
        "Draw rollouts once, without FP8, and compute log-probabilities, weights and gradient with the teacher, the "
        "student and both in FP8, as the recipe's precision sections say (else hybrid, tensorwise); beside it what "
        "bf16 does. FP8 is emulated where Transformer Engine or a GPU is missing. No step is taken."
    )
    usage = "renio compare-precision RECIPE [key=value ...] [--nproc N] [--prompts K] [--output DIR]"
    command = commands.add_parser("compare-precision", description=what, usage=usage)
    _add_recipe(command)
    command.add_argument("--nproc", type=_positive, metavar="N", help="ranks to start here (default: one model copy)")
    command.add_argument("--prompts", type=_positive, metavar="K", help="prompts (default: train.global_batch_size)")
    command.add_argument("--output", metavar="DIR", help="directory for precision.json (default: only the table)")
    command.set_defaults(run=_run_compare_precision)


def _add_fresh(command: argparse.ArgumentParser) -> None:
    command.add_argument("--fresh", action="store_true", help="move an existing run aside and start a new one")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of GiB above 0; got {text!r}")
    return value


def _run_recipe(arguments: argparse.Namespace) -> int:
    """Runs as a rank of torchrun or srun, or does the cheap checks and starts ranks itself."""
    from renio_megatron.cli import launch

    overrides = [*arguments.overrides, *arguments.extra]
    rank_arguments = [arguments.command, arguments.recipe, *overrides, *_fresh(arguments)]
    if launch.is_rank():
        launch.refuse_nproc(arguments.nproc)
        from renio_megatron.cli.worker import run_rank

        run_rank(rank_arguments)

    from renio_megatron.config.load import load_recipe
    from renio_megatron.runner.describe import finished_message
    from renio_megatron.runner.recipe import check_run
    from renio_megatron.runner.run_directory import RunDirectory

    recipe = load_recipe(arguments.command, arguments.recipe, overrides)
    config = recipe.config
    num_ranks = arguments.nproc or config.fewest_ranks
    check_run(config, num_ranks)
    if RunDirectory(config.output_dir).state(recipe, arguments.fresh) == "finished":
        print(finished_message(config))
        return 0
    return launch.start_ranks(rank_arguments, num_ranks)


def _run_plan(arguments: argparse.Namespace) -> int:
    from renio_megatron.cli.plan import plan

    overrides = [*arguments.overrides, *arguments.extra]
    return plan(arguments.recipe, overrides, world_size=arguments.gpus, memory_gib=arguments.memory)


def _run_preview(arguments: argparse.Namespace) -> int:
    """Shows prompts in this process; for `--check`, runs as a rank of torchrun or srun, or starts ranks itself."""
    from renio_megatron.cli.preview import check, show

    overrides = [*arguments.overrides, *arguments.extra]
    if arguments.check:
        return check(arguments.recipe, overrides, arguments.nproc)
    if arguments.nproc is not None:
        raise ConfigError("--nproc starts ranks for --check; without it, `renio preview` needs none. Leave it out.")
    show(arguments.recipe, overrides, arguments.prompts, as_json=arguments.json, is_resolved=arguments.resolved)
    return 0


def _run_doctor(arguments: argparse.Namespace) -> int:
    """Runs as a rank of torchrun or srun, or starts ranks itself."""
    from renio_megatron.cli import launch
    from renio_megatron.cli.doctor import read_settings

    words = [*arguments.words, *arguments.extra]
    recipe = words.pop(0) if words and "=" not in words[0] else ""
    rank_arguments = ["doctor", recipe, *words]
    if launch.is_rank():
        launch.refuse_nproc(arguments.nproc)
        from renio_megatron.cli.worker import run_rank

        run_rank(rank_arguments)
    settings = read_settings(recipe or None, words)
    return launch.start_ranks(rank_arguments, arguments.nproc or settings.parallel.model_ranks)


def _run_compare_precision(arguments: argparse.Namespace) -> int:
    """Runs as a rank of torchrun or srun, or does the cheap checks and starts ranks itself."""
    from renio_megatron.cli import launch

    overrides = [*arguments.overrides, *arguments.extra]
    if arguments.prompts is not None:
        overrides.append(f"train.global_batch_size={arguments.prompts}")
    rank_arguments = ["compare-precision", arguments.recipe, *overrides]
    if arguments.output is not None:
        rank_arguments.append(f"--output={arguments.output}")
    if launch.is_rank():
        launch.refuse_nproc(arguments.nproc)
        from renio_megatron.cli.worker import run_rank

        run_rank(rank_arguments)

    from renio_megatron.config.load import check_models, check_world, load_recipe

    config = load_recipe("train", arguments.recipe, overrides).config
    num_ranks = arguments.nproc or config.fewest_ranks
    check_world(config, num_ranks)
    check_models(config)
    return launch.start_ranks(rank_arguments, num_ranks)


def _run_evaluate(arguments: argparse.Namespace) -> int:
    """Evaluates a server here; of a model, runs as a rank of torchrun or srun, or starts ranks itself."""
    from renio_megatron.cli import launch
    from renio_megatron.runner.evaluation_job import read_job

    options = evaluate.options_of(arguments)
    rank_arguments = ["evaluate", options.as_word()]
    if launch.is_rank():
        launch.refuse_nproc(arguments.nproc)
        from renio_megatron.cli.worker import run_rank

        run_rank(rank_arguments)

    job = read_job(options)
    if not job.is_local:
        evaluate.evaluate_at_server(job)
        return 0
    return launch.start_ranks(rank_arguments, arguments.nproc or job.config.parallel.model_ranks)


def _run_quickstart(arguments: argparse.Namespace) -> int:
    from renio_megatron.cli import launch

    if launch.is_rank():
        raise ConfigError(
            "quickstart starts its own 2 ranks; got RANK and WORLD_SIZE. Start it alone, without torchrun or srun."
        )
    return launch.start_ranks(["quickstart", arguments.output_dir, *_fresh(arguments)], num_ranks=2)


def _run_export(arguments: argparse.Namespace) -> int:
    """Runs in this process, as the only rank."""
    from pathlib import Path

    from renio_megatron.cli import launch

    run_dir = Path(arguments.run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise CheckpointError(
            f"{arguments.run_dir!r} is no run directory: it has no config.yaml. Give a run's output_dir."
        )
    launch.become_single_rank()

    from renio_megatron.runner.export import export_checkpoint

    destination = Path(arguments.destination)
    written = destination.resolve()  # an export to `.` replaces the current directory
    step = export_checkpoint(run_dir, destination, arguments.step, merge=arguments.merge, model=arguments.model)
    what = "adapter" if (written / "adapter_config.json").is_file() else "model"
    print(f"{arguments.destination} holds the {what} of step {step}")
    return 0


def _fresh(arguments: argparse.Namespace) -> list[str]:
    return ["--fresh"] if arguments.fresh else []


if __name__ == "__mp_main__":  # imported by a helper process that a library started
    from renio_megatron.cli.launch import end_with_parent

    end_with_parent()

if __name__ == "__main__":
    raise SystemExit(main())
