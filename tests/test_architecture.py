"""The floors of the house: who may import whom, read from the source without importing it."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "renio_megatron"
FLOORS = (
    ("errors", "types"),
    (
        "config",
        "models",
        "files",
        "objective",
        "parallel",
    ),
    (
        "losses",
        "data",
    ),
    ("training",),
    ("megatron", "evaluation"),
    ("runner",),
    ("diagnose", "plan", "report", "tools"),
    ("cli",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}
FORBIDDEN = (  # (files, imported modules, why); files are dotted names below the package, a folder ends in a dot
    (r"objective\.", rf"torch\.distributed|{PACKAGE}\.parallel", "objective is plain mathematics"),
    (r"(?!megatron\.)", "megatron", "only renio_megatron/megatron/ imports megatron"),
    (r"training\.trainer$", rf"{PACKAGE}\.megatron", "the trainer never meets renio_megatron.megatron"),
    (r"(?!parallel\.layout$|losses\.kernels\.|megatron\.)", r"torch\.cuda", "CUDA is chosen in the layout"),
)
MAX_LINES = 400


def imports_of(path: Path, module: str, modules: set[str]) -> set[str]:
    """Dotted names that a file imports anywhere, also inside functions, and every `torch.name` that it reads."""
    names, package = set(), module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.add(base if base in modules and full not in modules else full)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            names.add(f"torch.{node.attr}")
    return names


def violations(root: Path) -> list[str]:
    """Everything in the package under `root` that breaks the rules of the house."""
    found, modules, graph = [], {}, {}
    for path in sorted([*root.glob(f"{PACKAGE}/**/*.py"), *root.glob("tests/**/*.py")]):
        name = path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        if (length := len(path.read_text().splitlines())) > MAX_LINES:
            found.append(f"{name} has {length} lines, more than {MAX_LINES}")
        if name.startswith(f"{PACKAGE}."):  # the package itself holds only the lazy table of public names
            modules[name] = path
    for module, path in modules.items():
        inner, names = module.removeprefix(f"{PACKAGE}."), imports_of(path, module, modules.keys())
        room, where = inner.split(".")[0], f"{inner}." if path.stem == "__init__" else inner
        for files, imported, why in FORBIDDEN:
            if re.match(files, where):
                found += [f"{module} imports {n}: {why}" for n in sorted(names) if re.match(rf"({imported})(\.|$)", n)]
        rooms = {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")}
        meets_loop = f"{PACKAGE}.training.trainer" in names
        if meets_loop and "megatron" in rooms and inner != "runner.build":
            found.append(f"{module} imports both trainer and {PACKAGE}.megatron: only build.py may")
        if room not in FLOOR_OF:
            found.append(f"{module} is on no floor: add it to FLOORS")
        for other in sorted(rooms & FLOOR_OF.keys()):
            if FLOOR_OF[other] > FLOOR_OF.get(room, len(FLOORS)):
                found.append(f"{module} (floor {FLOOR_OF[room]}) imports {other} (floor {FLOOR_OF[other]})")
        graph[module] = (names & modules.keys()) - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("imports run in a circle: " + " -> ".join(error.args[1]))
    return found


def test_the_house_stands():
    found = violations(ROOT)
    assert not found, "\n".join(["", *found])


SOUND = {
    "errors.py": "class RenioError(Exception): ...",
    "objective/__init__.py": "from renio_megatron.objective import reduce",
    "objective/reduce.py": "import torch",
    "parallel/layout.py": "import torch\nimport torch.distributed as dist\ntorch.cuda.is_available()",
    "losses/__init__.py": "",
    "losses/kernels/__init__.py": "import torch\nfrom renio_megatron.parallel import layout\ntorch.cuda.synchronize()",
    "losses/distillation.py": "from renio_megatron.losses import kernels, weights",
    "losses/weights.py": "from ..objective.reduce import tokens_per_sequence\nweigh = 1",
    "megatron/model/__init__.py": "",
    "megatron/model/build.py": "from megatron.core import parallel_state",
    "training/__init__.py": "",
    "training/trainer.py": "from renio_megatron.errors import RenioError",
    "runner/__init__.py": "",
    "runner/build.py": "from renio_megatron.megatron.model import build\nfrom renio_megatron.training import trainer",
}


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("errors.py", "", None),
        ("objective/reduce.py", "import torch.distributed as dist", "reduce imports torch.distributed"),
        ("objective/reduce.py", "from torch import distributed", "reduce imports torch.distributed"),
        ("objective/reduce.py", "import torch\nx = torch.distributed.all_reduce", "reduce imports torch.distributed"),
        ("objective/reduce.py", "from ..parallel.layout import Layout", "reduce imports renio_megatron.parallel"),
        ("parallel/layout.py", "def f():\n    from megatron.core import mpu", "layout imports megatron.core.mpu"),
        ("losses/distillation.py", "import megatron", "distillation imports megatron: only"),
        ("losses/distillation.py", "import torch\ntorch.cuda.synchronize()", "distillation imports torch.cuda"),
        ("training/trainer.py", "from renio_megatron import megatron", "the trainer never meets"),
        (
            "cli/main.py",
            "import renio_megatron.training.trainer, renio_megatron.megatron.model.build",
            "only build.py may",
        ),
        (
            "errors.py",
            "from renio_megatron.losses.distillation import x",
            r"errors \(floor 1\) imports losses \(floor 3\)",
        ),
        (
            "losses/weights.py",
            "def f():\n    from renio_megatron.losses import distillation",
            "circle: .*losses.distillation",
        ),
        ("objective/reduce.py", "from renio_megatron.objective import entropy", "circle: .*renio_megatron.objective"),
        ("cellar.py", "", "cellar is on no floor"),
        ("losses/distillation.py", "x = 1\n" * 401, "distillation has 401 lines"),
    ],
)
def test_a_broken_wall_is_seen(tmp_path, file, source, message):
    for name, text in {**SOUND, file: source}.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = violations(tmp_path)
    assert (not found) if message is None else any(re.search(message, line) for line in found), found
