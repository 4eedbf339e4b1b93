"""Every layout, through the trainer, against a single process; `docs/layouts.md` holds the figures.

RENIO_WRITE_LAYOUTS=1 pytest tests/test_layout_matrix.py    # measures and writes them
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.layout_cases import LAYOUTS, MODELS, VARIANTS, Case, cases, run_matrix
from tests.multiprocess import run_ranks
from tests.training_cases import save_models

DOCUMENT = Path(__file__).parents[1] / "docs" / "layouts.md"
BEGIN, END = "<!-- matrix: written by tests/test_layout_matrix.py -->", "<!-- end of matrix -->"
ALL = [case for world_size in (2, 4) for case in cases(world_size)]

pytestmark = pytest.mark.timeout(1500)


def tolerance(case: Case) -> float:
    """Of a raw gradient, relative; bf16 keeps 8 bits."""
    return 2e-2 if case.variant == "bf16" else 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Case -> largest error over the ranks; two launches."""
    folder = tmp_path_factory.mktemp("layouts")
    save_models(folder, MODELS)
    merged: dict[str, dict[str, float]] = {}
    for world_size in (2, 4):
        by_rank = run_ranks(run_matrix, world_size, folder, world_size, timeout=700)
        for name in by_rank[0]:
            merged[name] = {key: max(found[name][key] for found in by_rank) for key in by_rank[0][name]}
    return merged


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_step_equals_the_single_process_reference(case: Case, results: dict[str, dict[str, float]]) -> None:
    found = results[case.name]
    assert found["gradient"] < tolerance(case)
    assert found["grad_norm"] < tolerance(case)
    assert found["loss"] < tolerance(case)
    assert found["weight"] < 1e-5
    assert found["unlike_1"] > 2  # weights that are all 1 would prove nothing


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_layout_draws_the_same_rollouts(tied: bool, results: dict[str, dict[str, float]]) -> None:
    for deep in (False, True):
        chosen = [case.name for case in ALL if (case.tied, case.deep) == (tied, deep) and case.variant != "bf16"]
        assert len({results[name]["tokens"] for name in chosen}) == 1


def test_the_document_shows_every_layout(results: dict[str, dict[str, float]]) -> None:
    table = matrix(results)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    written, after = rest.split(END)
    if os.environ.get("RENIO_WRITE_LAYOUTS") == "1":
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")
        return
    # Figures differ in their last digits between machines; the rows, the columns and the bounds do not.
    rows, expected = ([line.split("|") for line in part.strip().splitlines()] for part in (written, table))
    assert [row[1] for row in rows] == [row[1] for row in expected]
    assert rows[0] == expected[0]
    for row in rows[2:]:
        for heading, cell in zip(rows[0][2:-1], row[2:-1], strict=True):
            if cell.strip() != "-":
                assert float(cell) < (2e-2 if heading.strip() == "bf16" else 1e-5)


def matrix(results: dict[str, dict[str, float]]) -> str:
    """The table: a row for each layout, a column for each variant, the largest gradient error of its cases."""
    lines = [f"| layout | {' | '.join(VARIANTS)} |", "|---" * (len(VARIANTS) + 1) + "|"]
    for layout in LAYOUTS:
        cells = []
        for variant in VARIANTS:
            errors = [
                results[case.name]["gradient"] for case in ALL if (case.layout, case.variant) == (layout, variant)
            ]
            cells.append(f"{max(errors):.1e}" if errors else "-")
        lines.append(f"| {layout} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
