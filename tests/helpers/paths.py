"""Where the tree is, and what the tests keep in it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "reference_data" / "models"
SHARED = ROOT.parent / "shared"
"""Files that are no part of the repository, beside it on some machines; tests that need them skip elsewhere."""
