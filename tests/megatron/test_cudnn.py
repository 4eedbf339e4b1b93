"""Which cuDNN Transformer Engine is told of while it is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from renio_megatron.megatron.model import backend
from renio_megatron.megatron.runtime import cudnn
from renio_megatron.megatron.runtime.initialize import check_transformer_engine
from tests.megatron import te_imports

MAPS = """\
00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/python3
7f1c00000000-7f1c00021000 rw-p 00000000 00:00 0
7f1c10000000-7f1c10021000 r-xp 00000000 08:01 40 /site/nvidia/cudnn/lib/libcudnn_graph.so.9
7f1c20000000-7f1c20021000 r--p 00000000 08:01 41 /site/nvidia/cudnn/lib/libcudnn.so.9
7f1c30000000-7f1c30021000 r--p 00000000 08:01 42 /usr/local/cuda/lib64/libcudart.so.13
"""


def import_by_check():
    assert check_transformer_engine()


def import_by_question():
    backend.te_problem.cache_clear()
    assert backend.te_problem() is None
    backend.te_problem.cache_clear()


@pytest.fixture(params=[import_by_check, import_by_question])
def seen(request, tmp_path, monkeypatch):
    """(maps) -> CUDNN_HOME as a Transformer Engine sees it that is imported by either way."""
    for name in ("CUDNN_HOME", "CUDNN_PATH"):
        monkeypatch.delenv(name, raising=False)
    te_imports.put(monkeypatch, tmp_path, "import os\nHOME = os.environ.get('CUDNN_HOME')", "")

    def by_import(maps):
        monkeypatch.setattr(cudnn, "_maps", lambda: maps)
        request.param()
        return sys.modules["transformer_engine"].HOME

    yield by_import
    te_imports.forget(monkeypatch)


def test_it_is_the_one_that_torch_has_loaded_and_only_for_the_import(seen):
    assert seen(MAPS) == "/site/nvidia/cudnn/lib"
    assert "CUDNN_HOME" not in os.environ


@pytest.mark.parametrize("maps", ["", MAPS.replace("libcudnn.so.9", "libcudnn_ops.so.9")])
def test_without_any_nothing_is_said(seen, maps, tmp_path, monkeypatch):
    monkeypatch.setattr(cudnn.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert seen(maps) is None


def test_one_that_torch_has_not_loaded_yet_is_beside_it(seen, tmp_path, monkeypatch):
    library = tmp_path / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(cudnn.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert seen("") == str(library.parent)


def test_what_the_user_has_set_stays(seen, monkeypatch):
    monkeypatch.setenv("CUDNN_HOME", "/mine")
    assert seen(MAPS) == "/mine" == os.environ["CUDNN_HOME"]


def test_the_other_variable_of_the_user_is_not_overruled(seen, monkeypatch):
    monkeypatch.setenv("CUDNN_PATH", "/mine")
    assert seen(MAPS) is None


def test_this_process_is_read():
    if sys.platform != "linux":
        pytest.skip("maps are Linux's")
    import torch

    folder = cudnn.loaded_folder(cudnn._maps(), "libtorch_cpu.so")
    assert folder is not None and Path(folder).samefile(Path(torch.__file__).parent / "lib")
