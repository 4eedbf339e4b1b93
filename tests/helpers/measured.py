"""Measurements of a group of cases: (what, error, largest error that it may have)."""

from __future__ import annotations

from collections.abc import Sequence


def within_limits(measured: Sequence[tuple[str, float, float]], where: str = "") -> None:
    """Fails where there are none, or one of them is above its limit, or no number."""
    assert measured, "nothing was measured"
    wrong = [f"{label}: {found:.3g} > {bound:.3g}" for label, found, bound in measured if not found <= bound]
    assert not wrong, f"{where}{len(wrong)} of {len(measured)}: " + "; ".join(wrong[:5])
