"""Every layout, through the trainer, against a single process; `docs/design/layouts.md` holds the figures.

RENIO_WRITE_LAYOUTS=1 pytest tests/megatron/test_layout_matrix.py    # measures and writes them
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.helpers.multiprocess import Ranks
from tests.helpers.paths import ROOT
from tests.helpers.training_cases import save_models
from tests.megatron.layout_cases import FOUR_RANKS, LAYOUTS, MODELS, VARIANTS, Case, cases, run_case

DOCUMENT = ROOT / "docs" / "design" / "layouts.md"
BEGIN, END = "<!-- matrix: written by tests/megatron/test_layout_matrix.py -->", "<!-- end of matrix -->"
ALL = [case for world_size in (2, 4) for case in cases(world_size)]

pytestmark = pytest.mark.timeout(1500)  # of the tests that look at all of them, when they are chosen alone
Result = Callable[[Case], dict[str, float]]


def tolerance(case: Case) -> float:
    """Of a raw gradient, relative; bf16 keeps 8 bits."""
    return 2e-2 if case.variant == "bf16" else 1e-5


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks, four_ranks: Ranks) -> Result:
    """Case -> the largest errors over the ranks."""
    folder = tmp_path_factory.mktemp("layouts")
    save_models(folder, MODELS)

    def of(case: Case) -> dict[str, float]:
        by_rank = (four_ranks if case.layout in FOUR_RANKS else two_ranks).once(run_case, case, folder)
        return {key: max(found[key] for found in by_rank) for key in by_rank[0]}

    return of


@pytest.mark.matrix(11)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_step_equals_the_single_process_reference(case: Case, result: Result) -> None:
    found = result(case)
    assert found["gradient"] < tolerance(case)
    assert found["grad_norm"] < tolerance(case)
    assert found["loss"] < tolerance(case)
    assert found["weight"] < 1e-5
    assert found["unlike_1"] > 2  # weights that are all 1 would prove nothing


@pytest.mark.matrix(11)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_layout_draws_the_same_rollouts(tied: bool, result: Result) -> None:
    for deep in (False, True):
        chosen = [case for case in ALL if (case.tied, case.deep) == (tied, deep) and case.variant != "bf16"]
        assert len({result(case)["tokens"] for case in chosen}) == 1


@pytest.mark.matrix(11)
def test_the_document_shows_every_layout(result: Result) -> None:
    table = matrix(result)
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


def matrix(result: Result) -> str:
    """The table: a row for each layout, a column for each variant, the largest gradient error of its cases."""
    lines = [f"| layout | {' | '.join(VARIANTS)} |", "|---" * (len(VARIANTS) + 1) + "|"]
    for layout in LAYOUTS:
        cells = []
        for variant in VARIANTS:
            errors = [result(case)["gradient"] for case in ALL if (case.layout, case.variant) == (layout, variant)]
            cells.append(f"{max(errors):.1e}" if errors else "-")
        lines.append(f"| {layout} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
