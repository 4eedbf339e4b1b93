"""Fixtures that every test may use, the order of the files, and what `--fast` takes."""

from __future__ import annotations

import collections
import gc
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.multiprocess import Ranks

LONGEST = (
    "test_layout_matrix",
    "test_gpu_check",
    "test_moe",
    "test_smollm2",
    "test_quickstart",
    "test_teacher_kinds",
    "test_fault_messages",
    "test_cluster",
    "test_resharding",
    "test_benchmarks",
)
"""Files that come first, so that of two workers neither is left with a long one at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--shuffle`: tests of one file must not need those of another, in whatever order files come."""
    parser.addoption("--shuffle", type=int, metavar="SEED", help="take the files in a random order")
    parser.addoption("--exhaustive", action="store_true", help="also tests that take ten minutes or more")
    parser.addoption("--fast", action="store_true", help="no slow tests, and of each matrix one case in a few")


def pytest_configure() -> None:
    """A worker of several has one core. What is imported for collecting stays, and is not looked through again."""
    gc.disable()
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Rubbish is collected from here on."""
    gc.freeze()
    gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only tests marked `alone` are wanted, files without any need not be imported."""
    if not config.option.markexpr.startswith("alone") or collection_path.suffix != ".py":
        return None
    return True if "mark.alone" not in collection_path.read_text(encoding="utf-8") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whole files, the longest first, or at random."""
    if not config.getoption("--exhaustive"):
        for item in items:
            if item.get_closest_marker("exhaustive"):
                item.add_marker(pytest.mark.skip(reason="ten minutes or more: --exhaustive runs it"))
    if config.getoption("--fast"):
        _leave_out(config, items)
    files = list(dict.fromkeys(item.path for item in items))
    places = {name: place for place, name in enumerate(LONGEST)}
    if (seed := config.getoption("--shuffle")) is None:
        files.sort(key=lambda path: places.get(path.stem, len(places)))
    else:
        random.Random(seed).shuffle(files)
    order = {path: place for place, path in enumerate(files)}
    items.sort(key=lambda item: order[item.path])


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests; of `matrix(n)` all cases but the n-th, 2n-th, ...: of a test that is one case, that one.

    Where cases are a product of pairs an odd n takes both of each.
    """
    numbers: dict[str, int] = collections.Counter()
    left_out = []
    for item in items:
        function = item.nodeid.partition("[")[0]
        numbers[function] += 1
        mark = item.get_closest_marker("matrix")
        if item.get_closest_marker("slow") or (mark is not None and numbers[function] % mark.args[0]):
            left_out.append(item)
    dropped = set(left_out)
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """Two ranks for the tests of a file."""
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    """Four ranks for the tests of a file."""
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def ranks_by_number(two_ranks: Ranks, four_ranks: Ranks) -> Iterator[dict[int, Ranks]]:
    """Two, three and four ranks for the tests of a file."""
    with Ranks(3) as three_ranks:
        yield {2: two_ranks, 3: three_ranks, 4: four_ranks}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Text -> the file of a recipe that holds it."""

    def writer(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return writer


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of optional material beside the repository; the test is skipped where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"optional material is not here: {folder.name}/ beside the repository")
    return folder
