"""Keys of recipes that have another name than in earlier versions."""

from __future__ import annotations

RENAMED = {"weighting.normalise": "weighting.normalize"}
"""Old dotted key -> new one. A recipe with an old one is refused with the new name; a run's own settings are read."""
