"""adapter_config.json as people have it: what PEFT computes of it is computed here, or it is refused in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.multiprocess import Ranks
from tests.megatron.peft_cases import FIELDS, changes, compare, compare_all, save_adapter
from tests.models.hf_config_cases import save_family

peft = pytest.importorskip("peft")

TOLERANCE = 2e-4
REFUSED = (
    # PEFT loads these, by another forward pass, another base, or other tensors than the file has
    "target_modules=.*\\.(q|v)_proj",
    "target_modules=None",
    "exclude_modules=['down_proj']",
    "fan_in_fan_out=True",
    "bias=",
    "init_lora_weights=pissa_niter_4",
    "init_lora_weights=lora_ga",
    "layers_to_transform=",
    "alpha_pattern=",
    "alora_invocation_tokens=",
    "use_qalora=True",
    "one_of_next_year=",
)
LENIENT = ("rank_pattern=None", "alpha_pattern=None", "trainable_token_indices=[]", "velora_config={}")
"""PEFT fails on these; a value that says nothing passes here."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], dict]]:
    folder = tmp_path_factory.mktemp("adapters")
    with Ranks(1, timeout=300) as rank:
        yield lambda: rank.once(compare_all, folder)[0]


def test_every_field_is_tried() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(peft.LoraConfig)}


@pytest.mark.matrix(2)
def test_what_peft_computes_is_computed_or_refused(found: Callable[[], dict]) -> None:
    cases = found()
    assert cases.keys() == {name for name, _, _ in changes()} and len(cases) > 100
    for name, (differences, theirs, ours) in cases.items():
        for message in ours.values():
            assert message.count("\n") == 0 and "adapter_" in message and "TRACEBACK" not in message, (name, message)
        assert set(ours) in (set(), {"teacher", "student"}), (name, ours)
        if theirs:
            assert ours or name in LENIENT, f"{name}: PEFT fails ({theirs}), and it is computed here"
        elif ours:
            assert name.startswith(REFUSED), (name, ours)
        else:
            assert set(differences) == {"teacher", "student"}, name
            assert all(difference < TOLERANCE for difference in differences.values()), (name, differences)


@pytest.mark.matrix(2)
def test_a_refusal_names_the_option_and_a_value_that_says_nothing_passes(found: Callable[[], dict]) -> None:
    for name, key, value in changes():
        _, _, ours = found()[name]
        if not value and key not in ("target_modules", "lora_alpha"):
            assert not ours, name
        for role, message in ours.items():
            if key != "target_modules" and name != "exclude_modules=['down_proj']":
                assert f"has {key}={value!r}" in message, name
            assert message.startswith({"teacher": "teacher.adapter: ", "student": "lora.adapter: "}[role])


@pytest.mark.matrix(5)
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_adapters_that_took_a_part_of_the_weights(init: str, family: str, tmp_path: Path, two_ranks: Ranks) -> None:
    """Made by PEFT with that start, not only described so; on two tensor-parallel ranks."""
    save_family(family, tmp_path / "model")
    save_adapter(tmp_path / "model", tmp_path / "adapter", init)
    for differences, theirs, ours in two_ranks(compare, tmp_path / "model", tmp_path / "adapter", 2):
        assert (theirs, ours) == ("", {})
        assert all(difference < TOLERANCE for difference in differences.values())


def test_an_adapter_with_a_number_that_is_none_is_named(tmp_path: Path, two_ranks: Ranks) -> None:
    save_family("llama", tmp_path / "model")
    save_adapter(tmp_path / "model", tmp_path / "adapter")
    file, name = tmp_path / "adapter" / "adapter_model.safetensors", "layers.2.mlp.up_proj.lora_A.weight"
    state = load_file(file)
    [key] = [key for key in state if key.endswith(name)]
    state[key][1, 2] = float("inf")
    save_file(state, file, metadata={"format": "pt"})
    for _, _, ours in two_ranks(compare, tmp_path / "model", tmp_path / "adapter", 1):
        for role, setting in (("teacher", "teacher.adapter"), ("student", "lora.adapter")):
            assert ours[role].startswith(f"{setting}: ") and f"{name}" in ours[role] and "NaN or inf" in ours[role]
