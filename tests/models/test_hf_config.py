"""config.json as people have it: what transformers computes of it is computed here, or it is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from renio_megatron.models.architecture import notices
from renio_megatron.models.families import FAMILIES as SUPPORTED
from tests.helpers.multiprocess import Ranks
from tests.helpers.paths import ROOT
from tests.models.hf_config_cases import FAMILIES, RELEASED, ROPES, change, changes_of, compare_family, save_family

TOLERANCE = 2e-4
"""Of logits with a deviation of about 10; a head of its own, other frequencies or another factor change them by 1."""

Found = dict[str, tuple[float | None, str, str]]

REASONS = {
    # what the name of a configuration that transformers loads contains -> the words with which it is refused here
    "hidden_act=gelu": "hidden_act='gelu' is not supported",
    "model_type=mistral": "model_type 'mistral' is not supported",
    "sliding_window": "sliding_window=8 is not supported",
    "num_experts_per_tok=1": "no gradient reaches the router",
    "router_jitter_noise=0.1": "router_jitter_noise=0.1 is not supported",
    "longrope": "rope of the kind 'longrope' is not supported",
    "proportional": "rope of the kind 'proportional' is not supported",
}


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Found]]:
    """Family -> its configurations, all in one process."""
    folder = tmp_path_factory.mktemp("configs")
    with Ranks(1, timeout=600) as rank:
        yield lambda family: rank.once(compare_family, family, folder)[0]


@pytest.mark.matrix(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_computes_is_computed_or_refused(family: str, of: Callable[[str], Found]) -> None:
    found = of(family)
    assert found.keys() == {name for name, _ in changes_of(family)}
    assert len(found) > 120
    for name, (difference, theirs, ours) in found.items():
        assert not ours or (ours.count("\n") == 0 and "config.json" in ours), (name, ours)
        if theirs:
            assert ours, f"{name}: transformers fails ({theirs}), and it is computed here"
        elif ours:
            assert any(begin in name and words in ours for begin, words in REASONS.items()), (name, ours)
        else:
            assert difference is not None and difference < TOLERANCE, (name, difference)


@pytest.mark.matrix(2)
def test_few_that_transformers_loads_are_refused(of: Callable[[str], Found]) -> None:
    loaded = [ours for family in FAMILIES for _, theirs, ours in of(family).values() if not theirs]
    refused = [ours for ours in loaded if ours]
    assert len(loaded) > 400
    assert len(refused) <= len(loaded) // 10, refused


@pytest.mark.matrix(15)
@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_computed(name: str, of: Callable[[str], Found]) -> None:
    assert of(RELEASED[name][0])[f"released: {name}"][1:] == ("", "")


def test_every_reason_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "guides" / "models.md").read_text()
    for words in (
        "hidden_act",
        "model_type",
        "sliding_window",
        "num_experts_per_tok",
        "router_jitter_noise",
        "longrope",
    ):
        assert f"`{words}" in page, words


def test_the_defaults_that_are_written_down_are_those_of_the_classes() -> None:
    from transformers import CONFIG_MAPPING

    assert tuple(SUPPORTED) == tuple(FAMILIES)
    for family, one in SUPPORTED.items():
        config, defaults = CONFIG_MAPPING[family](), one.defaults
        assert {key: getattr(config, key) for key in defaults} == dict(defaults)
        assert config.num_key_value_heads == defaults.get("num_key_value_heads", config.num_attention_heads)


def test_what_another_program_may_read_otherwise_is_a_notice(tmp_path: Path) -> None:
    save_family("qwen3", tmp_path / "qwen3")

    def said(name: str, changes: dict[str, object]) -> list[str]:
        change(tmp_path / "qwen3", tmp_path / name, changes)
        return notices(tmp_path / name)

    assert notices(tmp_path / "qwen3") == []
    assert said("plain", {"rope_parameters": None, **RELEASED["Qwen3-8B with YaRN"][1]}) == []
    [ignored] = said("R1", {"rope_parameters": None, **RELEASED["R1-0528-Qwen3-8B"][1]})
    assert "does not read attn_factor=0.8782488562869419 of rope of the kind 'yarn'" in ignored
    [twice] = said("twice", {"rope_scaling": ROPES["linear"]})
    assert "rope_parameters beside rope_scaling" in twice and "'factor': 3.0" in twice
    config = json.loads((tmp_path / "qwen3" / "config.json").read_text())
    assert said("same", {"rope_scaling": config["rope_parameters"]}) == []
