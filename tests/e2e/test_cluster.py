"""The multi-node scripts on two "nodes" of this machine: the same losses as one node, losses of nodes, requeueing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.clusters import RECIPE, ROOT, SETTINGS, Cluster, free_port, slurm_commands, wait_for_listener
from tests.helpers.jobs import python_path
from tests.helpers.slow import SECONDS, SlowDraws

STATIC, ELASTIC = (str(ROOT / "examples" / "multi_node" / f"{name}.sh") for name in ("static", "elastic"))
SBATCH = str(ROOT / "scripts" / "slurm" / "train.sbatch")
STEPS = 4
SHORT = (RECIPE, *SETTINGS, f"train.train_iters={STEPS}", "checkpoint.save_interval=1", "output_dir=run")
START, FINISH = 150.0, 150.0  # seconds until the first steps, and until the end: many times what they take

pytestmark = [
    pytest.mark.skipif(not Path(STATIC).is_file(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
]


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Of the same run on one node."""
    with Cluster(tmp_path_factory.mktemp("single")) as single:
        command = (sys.executable, "-m", "renio_megatron.cli.main", "train", *SHORT, "--nproc", "4")
        assert single.start(*command, log="out.log").wait(timeout=FINISH) == 0, single.text("out.log")
        assert "world of 4 ranks on 1 node, TP 2 x PP 1 x DP 2; gloo, cpu; renio" in single.text("out.log")
        return [row["loss"] for row in single.rows("run")]


def start_nodes(cluster, script, *arguments, nodes=(0, 1), **environment):
    """The launchers of these nodes, each with 2 ranks; their outputs go to node0.log and node1.log."""
    return [
        cluster.start(
            script,
            *arguments,
            log=f"node{node}.log",
            **{"NODES": "2", "RANKS_PER_NODE": "2", "NODE_RANK": str(node), "LOCAL_ADDR": "127.0.0.1"} | environment,
        )
        for node in nodes
    ]


def assert_same_losses(cluster, losses):
    rows = cluster.rows("run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-5, rel=0)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_two_launchers_give_the_losses_of_one(cluster, losses):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launchers = start_nodes(cluster, STATIC, *SHORT, **place)
    codes = [launcher.wait(timeout=FINISH) for launcher in launchers]
    assert codes == [0, 0], cluster.text("node0.log") + cluster.text("node1.log")
    assert_same_losses(cluster, losses)
    text = cluster.text("node0.log")
    assert "[rank 0] world of 4 ranks on 2 nodes, TP 2 x PP 1 x DP 2; gloo, cpu; renio" in text
    assert "rendezvous" in text
    written = sorted((cluster.folder / "runs" / "logs").rglob("stdout.log"))
    assert len(written) == 4, "a file a rank"
    assert any("world of 4 ranks" in path.read_text() for path in written)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_where_one_launcher_is_told_to_stop_all_leave_in_the_middle_of_their_draws_and_go_on(cluster, losses):
    draws = SlowDraws(cluster.folder, "drawing", after=1, ranks=("0", "1", "2", "3"), pause=1.0)
    place = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": python_path(draws.path)}
    arguments = (*SHORT, "rollout.micro_batch_size=1")
    launchers = start_nodes(cluster, STATIC, *arguments, MASTER_PORT=str(free_port()), **place)
    draws.wait(lambda: None if launchers[0].poll() is None else cluster.text("node0.log"))
    launchers[1].terminate()
    codes = [launcher.wait(timeout=SECONDS) for launcher in launchers]
    text = cluster.text("node0.log") + cluster.text("node1.log")
    assert codes == [1, 1], text  # torchrun's own, where its ranks ended with 143
    assert "[rank 0] stopped by SIGTERM after step 1; the same command" in text
    assert not any("Traceback" in line for line in text.splitlines() if line.startswith("[rank"))
    draws.end()
    again = start_nodes(cluster, STATIC, *arguments, MASTER_PORT=str(free_port()), **place)
    assert [launcher.wait(timeout=FINISH) for launcher in again] == [0, 0], cluster.text("node0.log")
    assert_same_losses(cluster, losses)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_where_one_launcher_is_killed_the_other_ends_in_time(cluster):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    endless = [text.replace(f"train_iters={STEPS}", "train_iters=1000") for text in SHORT]
    first, second = start_nodes(cluster, STATIC, *endless, **place)
    cluster.wait_for("run", 1, START)
    os.kill(second.pid, signal.SIGKILL)
    assert first.wait(timeout=60) == 1
    assert "another rank" in cluster.text("node0.log")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_with_restarts_the_run_resumes_when_the_lost_node_is_back(cluster, losses):
    port = free_port()
    place = {"RDZV_ENDPOINT": f"127.0.0.1:{port}", "JOB_ID": "two"}
    (first,) = start_nodes(cluster, ELASTIC, *SHORT, nodes=(0,), **place)
    wait_for_listener(port, START)  # here both nodes have the endpoint's address, and the one that comes first hosts it
    (second,) = start_nodes(cluster, ELASTIC, *SHORT, nodes=(1,), **place)
    cluster.wait_for("run", 2, START)
    os.kill(second.pid, signal.SIGKILL)
    (third,) = start_nodes(cluster, ELASTIC, *SHORT, nodes=(1,), **place)
    codes = [launcher.wait(timeout=FINISH) for launcher in (first, third)]
    assert codes == [0, 0], cluster.text("node0.log") + cluster.text("node1.log")
    logs = cluster.text("node0.log") + cluster.text("node1.log")  # rank 0 may be the new node's in the second world
    assert logs.count("world of 4 ranks on 2 nodes") == 2
    assert_same_losses(cluster, losses)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_under_slurm_a_run_that_is_told_to_stop_is_queued_again_and_goes_on(cluster, losses):
    draws = SlowDraws(cluster.folder, "drawing", after=1, ranks=("0", "1"), pause=1.0)
    job = {
        "PATH": f"{slurm_commands(cluster.folder)}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_ON_NODE": "4",
        "MASTER_PORT": str(free_port()),
        "RANKS_PER_NODE": "1",  # half of what the other runs have: losses agree in any layout, and it runs twice
        "PYTHONPATH": python_path(draws.path),
    }
    arguments = (RECIPE, "2", *SHORT[1:-1], f"output_dir={cluster.folder / 'run'}")
    batch = cluster.start(SBATCH, *arguments, log="job.log", **job)
    draws.wait(lambda: None if batch.poll() is None else cluster.text("job.log"))
    (srun,) = (
        pid for pid in _children(batch.pid) if "tests.helpers.clusters" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    os.kill(srun, signal.SIGTERM)  # as --signal=TERM@600 does: to the step's tasks, not to the batch script
    assert batch.wait(timeout=SECONDS) == 143, cluster.text("job.log")
    assert (cluster.folder / "scontrol.txt").read_text().splitlines()[-1] == "requeue 4711"
    assert "stopped by SIGTERM after step 1; the same command" in cluster.text("job.log")
    assert len(cluster.rows("run")) == 1
    draws.end()
    again = cluster.start(SBATCH, *arguments, log="job.log", SLURM_RESTART_COUNT="1", **job)
    assert again.wait(timeout=FINISH) == 0, cluster.text("job.log")
    assert cluster.text("job.log").count("world of 2 ranks on 2 nodes") == 2
    assert_same_losses(cluster, losses)
    assert (cluster.folder / "scontrol.txt").read_text().count("requeue") == 1


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run_script(cluster, *command, **environment):
    done = subprocess.run(
        command,
        cwd=cluster.folder,
        env=cluster.environment | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_batch_script_queues_itself(cluster):
    bin_ = {"PATH": f"{slurm_commands(cluster.folder)}{os.pathsep}{os.environ['PATH']}"}
    assert run_script(cluster, SBATCH, RECIPE, "4", "train.lr=1e-5", **bin_) == (0, "")
    expected = f"--nodes 4 --ntasks-per-node 8 --gpus-per-node 8 scripts/slurm/train.sbatch {RECIPE} 4 train.lr=1e-5\n"
    assert (cluster.folder / "sbatch.txt").read_text() == expected
    assert run_script(cluster, SBATCH, RECIPE, "1", RANKS_PER_NODE="2", GPUS_PER_NODE="0", **bin_)[0] == 0
    last = (cluster.folder / "sbatch.txt").read_text().splitlines()[-1]
    assert last == f"--nodes 1 --ntasks-per-node 2 scripts/slurm/train.sbatch {RECIPE} 1"


def test_a_container_is_given_to_pyxis(cluster):
    job = {
        "PATH": f"{slurm_commands(cluster.folder)}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "a",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "CONTAINER_IMAGE": "renio.sqsh",
        "CONTAINER_MOUNTS": "/data:/data",
        "RANKS_PER_NODE": "1",
        "PYTHON": "true",
    }
    code, said = run_script(cluster, SBATCH, RECIPE, "1", **job)
    assert code == 0, said
    given = (cluster.folder / "srun.txt").read_text()
    for part in (
        "--container-image renio.sqsh",
        f"--container-workdir {ROOT}",
        f"--container-mounts {ROOT}:{ROOT},/data:/data",
        f"true -m renio_megatron.cli.main train {RECIPE}",
        "--kill-on-bad-exit=1 --label",
    ):
        assert part in given


@pytest.mark.parametrize(
    ("task", "restarts", "code", "requeues"),
    [
        ('touch "$RENIO_STOP_FILE"; exit 143', "0", 143, 1),
        ('touch "$RENIO_STOP_FILE"; exit 143', "2", 143, 0),  # as often as MAX_REQUEUES allows
        ("kill -TERM $$", "0", 143, 0),  # srun ended it because another task had failed
        ("exit 1", "0", 1, 0),
        ("exit 0", "0", 0, 0),
    ],
)
def test_only_a_run_that_was_told_to_stop_is_queued_again(cluster, task, restarts, code, requeues):
    python = cluster.folder / "python"
    python.write_text(f"#!/bin/sh\n{task}\n")
    python.chmod(0o755)
    job = {
        "PATH": f"{slurm_commands(cluster.folder)}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "a",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_RESTART_COUNT": restarts,
        "MAX_REQUEUES": "2",
        "RANKS_PER_NODE": "1",
        "PYTHON": str(python),
    }
    assert run_script(cluster, SBATCH, RECIPE, "1", **job)[0] == code
    assert (cluster.folder / "scontrol.txt").read_text().count("requeue 7") == requeues
    assert not (ROOT / ".renio-stopped-7").exists()


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        ((STATIC,), {}, "give a recipe"),
        ((STATIC, "none.yaml"), {}, "there is no recipe 'none.yaml'"),
        ((STATIC, RECIPE), {}, "NODES is the number of nodes; got ''"),
        ((STATIC, RECIPE), {"NODES": "2"}, "NODE_RANK is this node's number, 0 to 1; got ''"),
        ((STATIC, RECIPE), {"NODES": "2", "NODE_RANK": "2"}, "NODE_RANK is this node's number, 0 to 1; got '2'"),
        ((STATIC, RECIPE), {"NODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ((ELASTIC, RECIPE), {"NODES": "2"}, "RDZV_ENDPOINT is HOST:PORT of a node; got ''"),
        ((ELASTIC, RECIPE), {"NODES": "2", "RDZV_ENDPOINT": "a:1"}, "JOB_ID is not set"),
        ((SBATCH, RECIPE), {}, "give a recipe and a number of nodes"),
        ((SBATCH, RECIPE, "two"), {}, "give a recipe and a number of nodes"),
        ((SBATCH, RECIPE, "2"), {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": "/"}, "'/' is not the project"),
        (
            (SBATCH, RECIPE, "2"),
            {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "3"},
            "the job has 3 nodes, the command says 2",
        ),
    ],
)
def test_a_script_says_what_is_missing(cluster, command, environment, message):
    code, said = run_script(cluster, *command, **environment)
    assert code == 2
    assert said.startswith("error: ")
    assert message in said
