"""Where the tree is, and what the tests keep in it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "reference_data" / "models"
