"""The Dockerfile's rules, read without an engine: nothing here builds an image."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

SCRIPT = ROOT / "scripts" / "image_constraints.sh"

pytestmark = pytest.mark.skipif(not (ROOT / "Dockerfile").is_file(), reason="needs the source tree")


def instructions(text: str) -> list[tuple[str, str]]:
    """(word, rest) of each instruction, its lines joined; comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.strip().partition(" ") for line in joined.splitlines())
        if word
    ]


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether a .dockerignore leaves the path out: the last pattern that names it, or a folder above it, decides."""
    above = [path, *(str(parent) for parent in Path(path).parents)]
    result = False
    for pattern in patterns:
        anywhere = pattern.startswith("**/")
        names = [Path(name).name if anywhere else name for name in above if name != "."]
        if any(fnmatch(name, pattern.lstrip("!").removeprefix("**/")) for name in names):
            result = not pattern.startswith("!")
    return result


def problems(text: str, root: Path, patterns: list[str]) -> list[str]:
    """Every rule of ours that a Dockerfile breaks."""
    steps, found = instructions(text), []
    arguments = {
        rest.partition("=")[0]: rest.partition("=")[2] for word, rest in steps[: _first_from(steps)] if word == "ARG"
    }
    for word, rest in steps:
        if word == "FROM":
            image, _, tag = rest.partition(":")
            name = tag.strip("${}")
            if image != "nvcr.io/nvidia/pytorch" or not tag.startswith("${"):
                found.append(f"the base is not NVIDIA's by a build argument: {rest}")
            elif not re.fullmatch(r"\d\d\.\d\d-py3", arguments.get(name, "")):
                found.append(f"{name} has no pinned default")
        for command in re.split(r"&&|;|\|", rest) if word == "RUN" else ():
            if re.search(r"\bpip3?\b.*\binstall\b", command):
                if not re.search(r"\s(-c|--constraint)[ =]\S", command):
                    found.append(f"pip install without the constraint: {command.strip()}")
                if "--no-cache-dir" not in command:
                    found.append(f"pip leaves its cache: {command.strip()}")
        uses_apt = word == "RUN" and re.search(r"\bapt(-get)?\b.*\b(update|install)\b", rest)
        if uses_apt and "rm -rf /var/lib/apt/lists" not in rest:
            found.append(f"apt leaves its lists: {rest}")
        if word in ("COPY", "ADD"):
            for source in [part for part in shlex.split(rest) if not part.startswith("--")][:-1]:
                if not (root / source).exists():
                    found.append(f"{word} of what is not there: {source}")
                elif ignored(source, patterns):
                    found.append(f".dockerignore leaves out {source}")
    (entry,) = [rest for word, rest in steps if word == "ENTRYPOINT"] or [""]
    if not entry.startswith("[") or json.loads(entry)[0] != "renio":
        found.append(f"the entry point is not renio in exec form: {entry}")
    return found


def _first_from(steps: list[tuple[str, str]]) -> int:
    return next(index for index, (word, _) in enumerate(steps) if word == "FROM")


def test_the_dockerfile_keeps_the_rules():
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    text = (ROOT / "Dockerfile").read_text()
    assert problems(text, ROOT, patterns) == []
    assert ignored("tests/reference_data", patterns)
    assert ignored(".git", patterns)
    assert ignored("renio_megatron/__pycache__", patterns)
    assert not ignored("renio_megatron/cli/main.py", patterns)
    steps = instructions(text)
    assert steps.index(("USER", "${RUN_AS}")) > max(n for n, (word, _) in enumerate(steps) if word == "RUN")
    assert ("ARG", "RUN_AS=root") in steps
    (install,) = [rest for word, rest in steps if word == "RUN" and "pip install" in rest]
    before, after = install.split("pip install")
    assert "pins > image.txt" in before
    assert "diff image.txt" in after, "the image's versions are compared afterwards"


SOUND = """
ARG TAG=25.09-py3
FROM nvcr.io/nvidia/pytorch:${TAG}
COPY here there/
RUN pip install --no-cache-dir \\
    -c pins.txt .
ENTRYPOINT ["renio"]
"""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", None),
        (":${TAG}", ":25.09-py3", "by a build argument"),
        ("nvcr.io/nvidia/pytorch", "pytorch/pytorch", "by a build argument"),
        ("=25.09-py3", "", "no pinned default"),
        ("=25.09-py3", "=latest", "no pinned default"),
        ("-c pins.txt", "", "pip install without the constraint"),
        ("--no-cache-dir", "", "pip leaves its cache"),
        ("COPY here", "COPY here elsewhere", "not there: elsewhere"),
        ("COPY here", "COPY hidden", "leaves out hidden"),
        ('["renio"]', "renio", "not renio in exec form"),
        ('["renio"]', '["bash"]', "not renio in exec form"),
        ('ENTRYPOINT ["renio"]', "", "not renio in exec form"),
        ("RUN pip", "RUN apt-get update && apt-get install -y git\nRUN pip", "apt leaves its lists"),
        ("RUN pip", "RUN apt-get update && rm -rf /var/lib/apt/lists/*\nRUN pip", None),
    ],
)
def test_a_broken_rule_is_seen(tmp_path, old, new, problem):
    for name in ("here", "hidden"):
        (tmp_path / name).mkdir()
    found = problems(SOUND.replace(old, new, 1) if old else SOUND, tmp_path, ["hidden"])
    assert (not found) if problem is None else any(problem in line for line in found), found


INSTALLED = """\
apex==0.1
nvidia-dali-cuda130==1.51
numpy==1.26.4
pip==25.2
torch==2.9.0a0+145a3a7bda.nv25.9
transformer_engine==2.7.0+fedd9dd
transformers==5.23.0
triton==3.4.0
"""


def test_the_images_versions_take_the_place_of_ours(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat <<'END'\n{INSTALLED}END\n")
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}

    def run(*arguments: str) -> list[str]:
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    pins = run("pins")
    assert pins == sorted(line for line in INSTALLED.splitlines() if not line.startswith(("pip", "transformers")))
    (tmp_path / "pins").write_text("\n".join(pins) + "\n")
    combined = run("constraints", str(tmp_path / "pins"), str(ROOT / "constraints.txt"))
    names = [re.split("==", line)[0] for line in combined if "==" in line]
    assert combined[: len(pins)] == pins
    assert [names.count(name) for name in ("torch", "triton", "numpy")] == [1, 1, 1]
    assert any(line.startswith("transformers==") for line in combined), "the rest is ours"
    assert any(line.startswith("megatron-core==") for line in combined)
