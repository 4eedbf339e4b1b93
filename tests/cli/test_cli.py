import json
import os
import signal
import subprocess
import sys
import time

import pytest

import renio_megatron
from renio_megatron.cli import launch, worker
from renio_megatron.cli.main import main
from renio_megatron.errors import ConfigError, DataError, Scope
from tests.helpers import warm
from tests.helpers.jobs import python_path

# Stands in for runner/run.py and runner/export.py in every process that has it on its path; FAKE names the behaviour.
FAKE_RUN = """
import os, sys, time, types

def say(text):
    sys.stdout.write(text + "\\n")  # one write, which another rank's cannot split
    sys.stdout.flush()

def run_recipe(recipe, *, fresh, title, progress, **_):
    from renio_megatron.errors import ConfigError, DataError, Scope
    rank, behaviour = int(os.environ["RANK"]), os.environ.get("FAKE", "")
    say(f"rank {rank} of {os.environ['WORLD_SIZE']} seed {recipe.config.train.seed} fresh {fresh} "
          f"threads {os.environ['OMP_NUM_THREADS']} warnings {os.environ['PYTHONWARNINGS']}")
    if behaviour == "rank 1 raises":
        if rank == 1:
            raise DataError("line 3 is broken")
        time.sleep(300)
    if behaviour == "all raise":
        raise ConfigError("all ranks agree", scope=Scope.ALL_RANKS)
    if behaviour == "killed" and rank == 1:
        os.kill(os.getpid(), 9)
    if behaviour == "bug" and rank == 1:
        raise ZeroDivisionError("a bug")
    if behaviour in ("bug", "killed", "wait"):
        time.sleep(300)
    if rank == 0:
        os.makedirs(recipe.config.output_dir, exist_ok=True)
        with open(os.path.join(recipe.config.output_dir, "metrics.jsonl"), "w") as file:
            file.write('{"step": 1, "loss": 3.0}\\n{"step": 2, "loss": 2.0}\\n')
    return "new"

def export_checkpoint(run_dir, destination, step, merge, model):
    world = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    say(f"export {run_dir} {destination} {step} {merge} {model} {world}")
    return 40

for function, name in ((run_recipe, "run"), (export_checkpoint, "export")):
    module = types.ModuleType(f"renio_megatron.runner.{name}")
    setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
"""


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "sitecustomize.py").write_text(FAKE_RUN)
    left_out = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "PYTHONWARNINGS", "RENIO_TRACEBACK")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "PYTHONPATH": python_path(tmp_path / "fake")}


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "model").mkdir()
    content = {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {tmp_path / 'model'}\noutput_dir: run\n")
    return str(path)


@pytest.fixture
def renio(environment, tmp_path):
    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "renio_megatron.cli.main", *arguments]
        return warm.run(command, env=environment | variables, cwd=tmp_path, timeout=90)

    return run


@pytest.mark.alone
def test_help_is_quick_and_does_without_torch(environment):
    code = (
        "import sys; from renio_megatron.cli.main import main\n"
        "try: main(['--help'])\nfinally: print('torch' in sys.modules)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 1.5
    assert done.stdout.splitlines()[-1] == "False"
    for command in ("quickstart", "train", "sft", "plan", "export", "doctor", "compare-precision"):
        assert f"\n  {command} " in done.stdout


def test_recipes_are_checked_without_torch(environment, recipe):
    code = (
        "import sys; from renio_megatron.config.load import *\n"
        f"recipe = load_recipe('sft', {recipe!r}); check_world(recipe.config, 1); check_models(recipe.config)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version_and_no_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"renio {renio_megatron.__version__}\n"
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian", "a.yaml"],
        ["train"],
        ["train", "a.yaml", "--nproc", "0"],
        ["train", "a.yaml", "--nproc", "two"],
        ["train", "a.yaml", "--frsh"],
        ["export", "a"],
        ["export", "a", "b", "--step", "-1"],
        ["quickstart", "train.lr=1"],
    ],
)
def test_wrong_command_lines_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch):
    """The (arguments, num_ranks) of the ranks that would be started."""
    calls: list[tuple[list[str], int]] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def start(arguments, num_ranks):
        calls.append((arguments, num_ranks))
        return 7

    monkeypatch.setattr(launch, "start_ranks", start)
    return calls


def test_overrides_may_stand_on_both_sides_of_options(started, recipe):
    assert main(["sft", recipe, "train.seed=3", "--nproc", "2", "train.lr=1e-3", "--fresh", "data.seed=4"]) == 7
    assert started == [(["sft", recipe, "train.seed=3", "train.lr=1e-3", "data.seed=4", "--fresh"], 2)]


def test_as_many_ranks_as_one_copy_of_the_model_takes_are_started(started, recipe):
    sizes = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    main(["sft", recipe, *sizes])
    assert started == [(["sft", recipe, *sizes], 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.seeds=3"], "unknown key 'train.seeds'"),
        (["--nproc", "3", "parallel.tensor_model_parallel_size=2"], "world of 3"),
        (["parallel.pipeline_model_parallel_size=3"], "num_hidden_layers=4"),
        (["model=nowhere"], "there is no directory 'nowhere'"),
    ],
)
def test_mistakes_are_found_before_any_rank_starts(started, recipe, arguments, message, capsys):
    assert main(["sft", recipe, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert started == []


def test_tracebacks_are_shown_on_demand(started, recipe, monkeypatch):
    monkeypatch.setenv("RENIO_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        main(["sft", recipe, "train.seeds=3"])


def test_interruption_ends_with_one_line(started, monkeypatch, capsys):
    def interrupt(arguments, num_ranks):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "start_ranks", interrupt)
    assert main(["quickstart"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_quickstart_starts_two_ranks(started):
    assert main(["quickstart", "--fresh"]) == 7
    assert started == [(["quickstart", "runs/quickstart", "--fresh"], 2)]


def test_quickstart_is_refused_under_torchrun(started, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["quickstart"]) == 2
    assert "without torchrun" in capsys.readouterr().err
    assert started == []


def test_a_named_mistake_exits_2_in_one_line(renio, recipe):
    done = renio("train", recipe)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "teacher.model" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_ranks_run_a_recipe(renio, recipe):
    done = renio("sft", recipe, "train.seed=5", "--nproc", "2", "--fresh", OMP_NUM_THREADS="3", FAKE="")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert sorted(line for line in lines if line.startswith("rank ")) == [
        f"rank {rank} of 2 seed 5 fresh True threads 3 warnings ignore" for rank in (0, 1)
    ]
    # The first rank says, once, what is being done and what was written.
    assert sum("on its solutions; 100 steps of 32 sequences; TP 1 x PP 1 x DP 2" in line for line in lines) == 1
    assert "done: run holds metrics.jsonl, curves.png" in lines
    assert any(line.startswith("│ loss, first / last 5 steps (nats/token) │ 2.5 / 2.5 │") for line in lines)
    assert done.stderr == ""


def test_a_failing_rank_ends_the_others_and_is_the_only_one_to_speak(renio, recipe):
    start = time.monotonic()
    done = renio("sft", recipe, "--nproc", "2", FAKE="rank 1 raises")
    assert time.monotonic() - start < 60
    assert done.returncode == 2
    assert done.stderr == "[rank 1] error: line 3 is broken\n"
    assert f"threads {max(1, launch._num_cores() // 2)} " in done.stdout


def test_an_error_of_all_ranks_is_told_once(renio, recipe):
    done = renio("sft", recipe, "--nproc", "2", FAKE="all raise")
    assert done.returncode == 2
    assert done.stderr == "error: all ranks agree\n"


def test_a_bug_exits_1_with_its_traceback(renio, recipe):
    done = renio("sft", recipe, "--nproc", "2", FAKE="bug")
    assert done.returncode == 1
    assert done.stderr.startswith("[rank 1] unexpected error\nTraceback")
    assert done.stderr.endswith("ZeroDivisionError: a bug\n")


def test_a_rank_that_is_killed_is_named(renio, recipe):
    done = renio("sft", recipe, "--nproc", "2", FAKE="killed")
    assert done.returncode == 128 + 9
    assert done.stderr.startswith("error: rank 1 was ended by signal 9 (SIGKILL)")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_ends_all_ranks(environment, recipe, tmp_path):
    command = [sys.executable, "-m", "renio_megatron.cli.main", "sft", recipe, "--nproc", "1"]
    process = warm.Popen(
        command, env=environment | {"FAKE": "wait"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "on its solutions" in process.stdout.readline()
    assert process.stdout.readline().startswith("rank 0 of 1")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, error) == ("", "interrupted\n")


def test_ranks_of_torchrun_are_joined(renio, recipe):
    done = renio("sft", recipe, "--fresh", RANK="1", WORLD_SIZE="2", OMP_NUM_THREADS="1")
    assert done.returncode == 0
    assert done.stdout == "rank 1 of 2 seed 1234 fresh True threads 1 warnings ignore\n"
    refused = renio("sft", recipe, "--nproc", "2", RANK="0", WORLD_SIZE="2")
    assert refused.returncode == 2
    assert "--nproc would be ignored" in refused.stderr


def test_export_runs_as_the_only_rank(renio, tmp_path):
    refused = renio("export", "run", "hf")
    assert refused.returncode == 2
    assert "'run' is no run directory" in refused.stderr
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: a\n")
    assert renio("export", "run", "hf", "--step", "40").stdout == (
        "export run hf 40 False None rank 0 of 1\nhf holds the model of step 40\n"
    )
    assert "export run hf None True m rank 0" in renio("export", "run", "hf", "--merge", "--model=m").stdout
    crowd = renio("export", "run", "hf", RANK="0", WORLD_SIZE="2")
    assert crowd.returncode == 2
    assert "single rank" in crowd.stderr


@pytest.mark.parametrize(("rank", "shared", "waits"), [("1", False, [0.5]), ("1", True, [5.0]), ("0", True, [])])
def test_a_rank_waits_for_the_first_one_to_tell_an_error_that_all_share(monkeypatch, capsys, rank, shared, waits):
    slept = []

    def fail() -> None:
        raise DataError("broken", scope=Scope.ALL_RANKS if shared else Scope.ONE_RANK)

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(worker.time, "sleep", slept.append)
    assert worker._guard(fail) == 2
    assert slept == waits
    # Whoever is still there after that says it: no other rank has.
    assert capsys.readouterr().err == ("error: broken\n" if rank == "0" else "[rank 1] error: broken\n")


def test_a_recipe_that_every_rank_refuses_is_left_to_rank_0(monkeypatch, capsys, recipe):
    slept = []
    monkeypatch.setattr(worker.time, "sleep", slept.append)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, waits in (("0", False), ("2", True)):
        slept.clear()
        monkeypatch.setenv("RANK", rank)
        assert worker.main(["sft", recipe, "parallel.tensor_model_parallel_size=2"]) == 2
        assert "world of 3" in capsys.readouterr().err
        assert bool(slept) is waits
