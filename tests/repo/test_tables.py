"""Names that are repeated so that a typo is found without torch are the names of the real tables."""

from __future__ import annotations

from renio_megatron.config.keys import Keys
from renio_megatron.config.lazy import imported
from renio_megatron.config.renamed import RENAMED
from renio_megatron.config.rules.ignored import CHOICES
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.config.sections import data
from renio_megatron.config.sections.data import GRADERS, SOURCES
from renio_megatron.evaluation.sandbox import SANDBOXES
from renio_megatron.models.families import FAMILIES, MOE_FAMILIES
from renio_megatron.objective.divergences import DIVERGENCES
from tests.helpers.paths import ROOT


def test_recipe_choices_are_the_tables():
    assert set(CHOICES["loss.divergence"]) == set(DIVERGENCES)
    assert set(CHOICES["data.source"]) == set(SOURCES)
    assert all(callable(imported(place)) for place in GRADERS.values())
    assert tuple(SANDBOXES) == data.SANDBOXES
    assert {name for name, family in FAMILIES.items() if family.experts is not None} == set(MOE_FAMILIES)


def test_renamed_keys_are_on_their_page_and_lead_to_keys_that_are_there():
    page = (ROOT / "docs" / "reference" / "renamed.md").read_text()
    keys = Keys(DistillationConfig).values
    for old, new in RENAMED.items():
        assert f"recipe key `{old}` | `{new}`" in page
        assert new in keys and old not in keys
