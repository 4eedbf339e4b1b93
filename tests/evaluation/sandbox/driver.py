"""Runs all hostile programs in one back end, as whoever this process is, and prints what got out, as JSON.

python -m tests.evaluation.sandbox.driver landlock
python -m tests.evaluation.sandbox.driver landlock 1
python -m tests.evaluation.sandbox.driver control
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

from renio_megatron.evaluation.sandbox import Limits, SandboxError, sandbox_problem
from renio_megatron.evaluation.sandbox.launch import SupervisedSandbox
from tests.evaluation.sandbox import reaching_out
from tests.evaluation.sandbox.arena import Arena, wait_for_late_marks
from tests.evaluation.sandbox.case import Case
from tests.evaluation.sandbox.programs import CASES


def in_sandbox(arena: Arena, sandbox: SupervisedSandbox, name: str, case: Case) -> list[str]:
    """What is wrong after a program has run in a sandbox."""
    limits = Limits(**{"wall_s": 20, **case.limits})
    try:
        outcome = sandbox.run(arena.source(name, case.text), limits=limits)
    except SandboxError as error:
        return [f"not run: {error}", *arena.marks(b"")]
    output = outcome.stdout + outcome.stderr + outcome.result
    found = arena.marks(output)
    for attribute, value in case.outcome.items():
        if (got := getattr(outcome, attribute)) != value:
            found.append(f"{attribute} is {got!r:.200}, not {value!r:.200}")
    if case.inside.encode() not in output:
        found.append("it failed early")
    if found:
        found.append(f"exit code {outcome.exit_code}, stopped {outcome.stopped}, output {output[-600:]!r}")
    return found


def outside(arena: Arena, name: str, case: Case) -> list[str]:
    """What a program leaves that runs without a sandbox."""
    command = [sys.executable, "-c", arena.source(name, case.text)]
    plain = arena.folder / "plain"
    plain.mkdir()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, close_fds=False, cwd=plain, timeout=60
    )
    shutil.rmtree(plain)
    if name == "daemon":
        wait_for_late_marks()
    output, deadline = done.stdout + done.stderr, time.monotonic() + 5
    while not (found := arena.marks(output)) and time.monotonic() < deadline:
        time.sleep(0.1)  # a signal may be on its way
    return found


def main() -> None:
    """All programs: name -> what got out, or under `control` what was left."""
    backend = sys.argv[1]
    if backend != "control" and (problem := sandbox_problem(backend)) is not None:
        print(json.dumps({"problem": problem}))
        return
    arena = Arena()
    try:
        if backend == "control":
            found = {name: outside(arena, name, case) for name, case in CASES.items() if case.control}
        else:
            sandbox = SupervisedSandbox(backend, *map(int, sys.argv[2:]))
            found = {}
            # What programs may use does not depend on Landlock's version.
            cases = CASES if len(sys.argv) == 2 else reaching_out.CASES
            for name, case in sorted(cases.items(), key=lambda item: item[1].dangerous):
                if not (case.dangerous and any(found.values())):
                    found[name] = in_sandbox(arena, sandbox, name, case)
            wait_for_late_marks()
            found["later"] = arena.marks(b"")
    finally:
        arena.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
