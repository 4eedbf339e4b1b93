"""Keys of recipes that have been renamed since earlier versions."""

from __future__ import annotations

RENAMED = {"weighting.normalise": "weighting.normalize"}
"""Old dotted key -> new one. A recipe with an old key is refused with the new name; a run's stored settings are still
read."""
