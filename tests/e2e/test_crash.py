"""The short form of scripts/crash_test.sh: a run that is killed and restarted ends as one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.crash import crash


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")
def test_a_run_that_is_killed_and_stopped_ends_like_one_that_is_not(tmp_path: Path) -> None:
    kinds = ["inside save", "term", "anywhere", "one rank", "int"]
    assert crash(tmp_path, kinds=kinds, num_steps=15, seed=3, async_save=True) == []
