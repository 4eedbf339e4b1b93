"""Fixtures of the tests that need Megatron."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.training_cases import save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the student and the teachers of `training_cases`."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder
