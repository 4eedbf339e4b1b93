"""What an installation holds, what it asks for, and what an import costs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from importlib.metadata import distributions, version

import pytest
from packaging.version import Version

import renio_megatron
from renio_megatron.config.views import SHIPPED as VIEWS
from tests.helpers.paths import ROOT

REFUSED = ("apex", "transformer-engine", "transformer_engine")
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
SHIPPED = {
    "renio_megatron/models/shipped/modchain/quickstart.yaml",
    *(f"renio_megatron/models/shipped/modchain/{who}/{name}" for who in ("student", "teacher") for name in MODEL_FILES),
    *(f"renio_megatron/config/views/{name}.txt" for name in VIEWS),
}

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the tree, tests included, built from what is installed."""
    # Not by find_spec: asked for pip, setuptools takes its own distutils out of this process for good.
    installed = {str(one.metadata["Name"]).lower() for one in distributions()}
    missing = [name for name in ("pip", "setuptools") if name not in installed]
    if not missing and Version(version("setuptools")) < Version("70.1") and "wheel" not in installed:
        missing = ["wheel"]  # setuptools makes wheels itself since 70.1
    if missing:
        pytest.skip(f"a wheel cannot be built here: no {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "runs", "build", "dist")
    source = folder / "source"
    source.mkdir()
    for name in ("renio_megatron", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", str(folder / "out")]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "out").glob("*.whl")
    return zipfile.ZipFile(path)


def _metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_the_wheel_holds_every_module_and_the_models_and_no_tests(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "renio_megatron").rglob("*.py")}
    assert len(modules) > 40
    assert names == modules | SHIPPED | ({"renio_megatron/py.typed"} & names)


def test_the_models_in_the_wheel_are_those_of_the_tree(wheel):
    for name in SHIPPED:
        assert wheel.read(name) == (ROOT / name).read_bytes()


def test_the_wheel_brings_the_command_and_the_version(wheel):
    assert "renio = renio_megatron.cli.main:main" in _metadata(wheel, "entry_points.txt").splitlines()
    metadata = message_from_string(_metadata(wheel, "METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("renio-megatron", renio_megatron.__version__)
    assert metadata.get_payload().strip(), "the page of the project is not empty"


def test_no_dependency_needs_a_compiler(wheel):
    required = message_from_string(_metadata(wheel, "METADATA")).get_all("Requires-Dist", [])
    names = {re.split(r"[\s;<>=!~\[(]", text, maxsplit=1)[0].lower() for text in required}
    assert {"torch", "megatron-core", "transformers"} <= names
    assert names.isdisjoint(REFUSED)
    for path in (ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "setup.py"):
        text = "\n".join(line.partition("#")[0] for line in path.read_text().splitlines()).lower()
        assert not any(name in text for name in REFUSED), path.name


def _imported(code: str, names: tuple[str, ...]) -> list[str]:
    """Those of `names` that are imported after `code` in a fresh interpreter."""
    script = f"import sys, json\n{code}\nprint(json.dumps([name for name in {names!r} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


HEAVY = ("megatron", "transformers", "matplotlib")


def test_importing_the_package_imports_nothing_heavy():
    assert _imported("import renio_megatron", ("torch", *HEAVY)) == []


def test_the_public_names_do_without_megatron():
    code = (
        "from renio_megatron import LossConfig, VocabShard, WeightingConfig, distillation_loss\nimport renio_megatron\n"
    )
    code += "assert all(callable(getattr(renio_megatron, name)) for name in renio_megatron.__all__)"
    assert _imported(code, ("torch", *HEAVY)) == ["torch"]


def test_settings_descriptions_and_plans_do_without_torch():
    folder = ROOT / "renio_megatron"
    files = [*(folder / "config").rglob("*.py"), *(folder / "tools" / "plan").glob("*.py"), folder / "cli" / "main.py"]
    names = [file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in files]
    names = [name.removesuffix(".__init__") for name in [*names, "renio_megatron.models.architecture"]]
    code = "import sys\nsys.modules['torch'] = None\n" + "\n".join(f"import {name}" for name in sorted(names))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_loop_and_the_algorithms_do_without_megatron():
    parts = ("trainer", "algorithms.distillation", "algorithms.sft", "lr_schedule", "interfaces")
    assert _imported("; ".join(f"import renio_megatron.training.{part}" for part in parts), HEAVY) == []
