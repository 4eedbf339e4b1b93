"""Where the tree is, and what the tests keep in it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "reference_data" / "models"
EXAMPLES = ROOT / "examples"
RECIPES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name != "parts")
"""The examples that are recipes; parts are not complete by themselves."""
SHARED = ROOT.parent / "shared"
"""Files that are no part of the repository, beside it on some machines; tests that need them skip elsewhere."""


def kind_of_example(path: Path) -> str:
    """The command of an example: `sft` or `train`."""
    return "sft" if path.parent == EXAMPLES / "modchain" or path.name.startswith("sft") else "train"
