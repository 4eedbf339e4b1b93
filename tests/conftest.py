"""Fixtures that every test may use, and the order of the files."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

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


def pytest_configure() -> None:
    """A worker of several has one core."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whole files, the longest first, or at random."""
    files = list(dict.fromkeys(item.path for item in items))
    places = {name: place for place, name in enumerate(LONGEST)}
    if (seed := config.getoption("--shuffle")) is None:
        files.sort(key=lambda path: places.get(path.stem, len(places)))
    else:
        random.Random(seed).shuffle(files)
    order = {path: place for place, path in enumerate(files)}
    items.sort(key=lambda item: order[item.path])


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of optional material beside the repository; the test is skipped where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"optional material is not here: {folder.name}/ beside the repository")
    return folder
