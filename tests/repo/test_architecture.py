"""The floors of the house: who may import whom, read from the source without importing it."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = "renio_megatron"
ROOT_MODULES = ("errors", "types", "files")
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "types"),
    ("files", "models", "objective", "parallel"),
    ("config",),
    ("losses", "data"),
    ("training",),
    ("megatron", "evaluation"),
    ("runner",),
    ("tools",),
    ("cli",),
)
INNER_FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "config": (
        ("foreign_names", "lazy", "renamed", "validators", "templates", "views"),
        ("tagged",),
        ("places",),
        ("keys",),
        ("flat", "inheritance"),
        ("parser",),
        ("sections", "expand_views"),
        ("teachers",),
        ("schema",),
        ("rules", "resume"),
        ("load", "mistakes", "resolved"),
    ),
    "losses": (
        ("argument_checks", "chunk_size", "entropy", "kernels", "weigh"),
        ("sample_weights", "chunked_logits", "vocab_passes"),
        ("distillation", "token_logp"),
        ("chunked_loss", "tune_kernels"),
        ("linear_distillation",),
    ),
    "training": (
        ("metrics", "lr_schedule", "rollout_log", "targets", "canary_findings", "largest_weight"),
        ("interfaces", "notices", "weights_line"),
        ("algorithms", "canaries"),
        ("trainer",),
    ),
    "megatron": (("runtime", "own_loop"), ("model",), ("student", "teacher"), ("checkpoint",), ("weights",)),
}
FORBIDDEN = (  # (files, imported modules, why); files are dotted names below the package, a folder ends in a dot
    (r"objective\.", rf"torch\.distributed|{PACKAGE}\.parallel", "objective is plain mathematics"),
    (r"(?!megatron\.)", "megatron", "only renio_megatron/megatron/ imports megatron"),
    (r"training\.trainer$", rf"{PACKAGE}\.megatron", "the trainer never meets renio_megatron.megatron"),
    (r"(?!parallel\.devices$|losses\.kernels\.|megatron\.)", r"torch\.cuda", "parallel.devices chooses the device"),
)
OBJECT_COLLECTIVES = ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list")
COLLECTIVES = "parallel.collectives"
MAX_LINES = 400
MAX_FUNCTION_LINES = 60  # without the docstring
MAX_PARAMETERS = 12
LONG_FUNCTIONS = {
    "objective.reference.reference_objective": "the whole objective on one page",
    "losses.distillation.distillation_loss": "the public loss: what a loop of one's own may say",
    "losses.linear_distillation.linear_distillation_loss": "the same",
}
"""Functions that may be longer, or take more, each with the reason; Triton's kernels take what a launch gives them."""
MAX_FLOORS = 10


def _floor_of(floors: tuple[tuple[str, ...], ...], room: str) -> int | None:
    return next((number for number, rooms in enumerate(floors, 1) if room in rooms), None)


def _arrows_up(module: str, names: set[str], floors: tuple[tuple[str, ...], ...], depth: int) -> list[str]:
    """A line for each import of a room on a higher floor; rooms are the parts number `depth` of dotted names."""
    path, found = module.split("."), []
    if len(path) <= depth:
        return []
    if (own := _floor_of(floors, path[depth])) is None:
        return [f"{module} is on no floor: add it to the floors of {'.'.join(path[:depth])}"]
    around = ".".join(path[:depth]) + "."
    for other in sorted({name.split(".")[depth] for name in names if name.startswith(around)}):
        if (floor := _floor_of(floors, other)) is not None and floor > own:
            found.append(f"{module} (floor {own}) imports {other} (floor {floor})")
    return found


def _circle(graph: dict[str, set[str]], what: str) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"{what} run in a circle: " + " -> ".join(error.args[1])]
    return []


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


def unwanted(path: Path, module: str) -> list[str]:
    """Collectives of pickled objects outside their file, and attributes set on exceptions."""
    found, tree = [], ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in OBJECT_COLLECTIVES and module != COLLECTIVES:
            found.append(f"{module} calls {node.attr}: only {COLLECTIVES} may")
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        nodes = list(ast.walk(function))
        errors = {node.name for node in nodes if isinstance(node, ast.ExceptHandler)}
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                made = ast.unparse(node.value.func).rpartition(".")[2]
                if made.endswith("Error"):
                    errors |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        for node in nodes:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if (
                    isinstance(target, ast.Attribute)
                    and isinstance(target.value, ast.Name)
                    and target.value.id in errors
                ):
                    found.append(
                        f"{module} sets {target.value.id}.{target.attr}: an error says what it is when it is made"
                    )
    return found


def long_functions(path: Path, module: str) -> list[str]:
    """Functions that are too long, or take too much."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or module == "losses.kernels.triton_kernels":
            continue
        name, first = f"{module}.{node.name}", node.body[0]
        assert node.end_lineno is not None and first.end_lineno is not None
        doc = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
        lines = node.end_lineno - node.lineno + 1 - doc
        taken = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
        if name in LONG_FUNCTIONS:
            continue
        if lines > MAX_FUNCTION_LINES:
            found.append(f"{name} has {lines} lines, more than {MAX_FUNCTION_LINES}")
        if taken > MAX_PARAMETERS and not node.name.startswith("_"):  # nor those that build something
            found.append(f"{name} takes {taken} parameters, more than {MAX_PARAMETERS}")
    return found


def violations(root: Path) -> list[str]:
    """Everything in the package under `root` that breaks the rules of the house."""
    found: list[str] = []
    modules: dict[str, Path] = {}
    graph: dict[str, set[str]] = {}
    rooms: dict[str, set[str]] = {}
    for path in sorted([*root.glob(f"{PACKAGE}/**/*.py"), *root.glob("tests/**/*.py")]):
        name = path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        if (length := len(path.read_text().splitlines())) > MAX_LINES:
            found.append(f"{name} has {length} lines, more than {MAX_LINES}")
        if name.startswith(f"{PACKAGE}."):  # the package itself holds only the lazy table of public names
            modules[name] = path
    for module, path in modules.items():
        inner, names = module.removeprefix(f"{PACKAGE}."), imports_of(path, module, modules.keys())
        found += unwanted(path, inner)
        found += long_functions(path, inner)
        room, where = inner.split(".")[0], f"{inner}." if path.stem == "__init__" else inner
        for files, imported, why in FORBIDDEN:
            if re.match(files, where):
                found += [f"{module} imports {n}: {why}" for n in sorted(names) if re.match(rf"({imported})(\.|$)", n)]
        if {f"{PACKAGE}.training.trainer", f"{PACKAGE}.megatron"} <= _with_parents(names) and inner != "runner.build":
            found.append(f"{module} imports both trainer and {PACKAGE}.megatron: only runner/build.py may")
        if path.parent == root / PACKAGE and inner not in ROOT_MODULES:
            found.append(f"{module} is a loose module at the root: give it a room")
        found += _arrows_up(module, names, FLOORS, 1)
        if room in INNER_FLOORS:
            found += _arrows_up(module, names, INNER_FLOORS[room], 2)
        graph[module] = (names & modules.keys()) - {module}
        rooms.setdefault(room, set()).update({name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")})
    for room, others in rooms.items():
        others.intersection_update(rooms.keys() - {room})
    return [*found, *_circle(graph, "imports"), *_circle(rooms, "rooms")]


def _with_parents(names: set[str]) -> set[str]:
    """The names and whatever they lie in."""
    return {".".join(parts[:n]) for name in names for parts in [name.split(".")] for n in range(1, len(parts) + 1)}


def test_there_are_few_floors():
    assert len(FLOORS) <= MAX_FLOORS
    assert len({room for rooms in FLOORS for room in rooms} - set(ROOT_MODULES)) <= 13


def test_the_house_stands():
    found = violations(ROOT)
    assert not found, "\n".join(["", *found])


SOUND = {
    "errors.py": "class RenioError(Exception): ...",
    "objective/__init__.py": "from renio_megatron.objective import reduce",
    "objective/reduce.py": "import torch",
    "parallel/layout.py": "import torch\nimport torch.distributed as dist",
    "parallel/devices.py": "import torch\ntorch.cuda.is_available()",
    "losses/kernels/__init__.py": "import torch\nfrom renio_megatron.parallel import layout\ntorch.cuda.synchronize()",
    "losses/distillation.py": "from renio_megatron.losses import kernels, sample_weights",
    "losses/sample_weights.py": "from ..objective.reduce import tokens_per_sequence\nweigh = 1",
    "training/trainer.py": "from renio_megatron.errors import RenioError",
    "megatron/runtime/initialize.py": "from megatron.core import parallel_state",
    "megatron/model/build.py": "from renio_megatron.megatron.runtime import initialize",
    "runner/build.py": "from renio_megatron.megatron.model import build\nfrom renio_megatron.training import trainer",
}


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("errors.py", "", None),
        ("objective/reduce.py", "import torch.distributed as dist", "reduce imports torch.distributed"),
        ("objective/reduce.py", "from torch import distributed", "reduce imports torch.distributed"),
        ("objective/reduce.py", "import torch\nx = torch.distributed.all_reduce", "reduce imports torch.distributed"),
        (
            "objective/reduce.py",
            "from ..parallel.layout import ParallelLayout",
            "reduce imports renio_megatron.parallel",
        ),
        ("parallel/layout.py", "def f():\n    from megatron.core import mpu", "layout imports megatron.core.mpu"),
        ("losses/distillation.py", "import megatron", "distillation imports megatron: only"),
        ("losses/distillation.py", "import torch\ntorch.cuda.synchronize()", "distillation imports torch.cuda"),
        ("training/trainer.py", "from renio_megatron import megatron", "the trainer never meets"),
        (
            "cli/main.py",
            "import renio_megatron.training.trainer, renio_megatron.megatron.model.build",
            "only runner/build.py may",
        ),
        (
            "errors.py",
            "from renio_megatron.losses.distillation import x",
            r"errors \(floor 1\) imports losses \(floor 4\)",
        ),
        (
            "megatron/runtime/initialize.py",
            "from renio_megatron.megatron.model.build import x",
            r"initialize \(floor 1\) imports model \(floor 2\)",
        ),
        (
            "losses/kernels/__init__.py",
            "def f():\n    from renio_megatron.losses import distillation",
            "circle: .*losses.distillation",
        ),
        ("objective/reduce.py", "from renio_megatron.objective import entropy", "circle: .*renio_megatron.objective"),
        ("files.py", "from renio_megatron.parallel import layout", None),
        ("parallel/layout.py", "from renio_megatron import models", None),
        ("cellar.py", "", "cellar is on no floor"),
        ("cellar.py", "", "cellar is a loose module"),
        ("cellar/boxes.py", "", "boxes is on no floor"),
        ("megatron/cellar.py", "", "cellar is on no floor"),
        (
            "runner/build.py",
            "import torch.distributed as dist\ndef f():\n    dist.all_gather_object([], 1)",
            "build calls all_gather_object: only parallel.collectives",
        ),
        ("parallel/collectives.py", "import torch.distributed as dist\ndist.all_gather_object([], 1)", None),
        (
            "runner/build.py",
            "def f():\n    try:\n        g()\n    except OSError as error:\n        error.shared = True",
            "build sets error.shared",
        ),
        ("runner/build.py", "def f():\n    e = DataError()\n    e.step = 1\n    raise e", "build sets e.step"),
        ("runner/build.py", "def f():\n" + "    x = 1\n" * 61, "build.f has 62 lines"),
        (
            "runner/build.py",
            f"def f({', '.join(f'a{n}' for n in range(13))}):\n    ...",
            "build.f takes 13 parameters",
        ),
        ("losses/distillation.py", "x = 1\n" * 401, "distillation has 401 lines"),
    ],
)
def test_a_broken_wall_is_seen(tmp_path, file, source, message):
    for name, text in {**SOUND, file: source}.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").touch()
        path.write_text(text)
    found = violations(tmp_path)
    assert (not found) if message is None else any(re.search(message, line) for line in found), found


def test_rooms_that_lean_on_each_other_are_seen(tmp_path):
    for room, other in (("files", "models"), ("models", "parallel"), ("parallel", "files")):
        path = tmp_path / PACKAGE / (f"{room}.py" if room == "files" else f"{room}/a_{other}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"from renio_megatron import {other}")
        (path.parent / "__init__.py").touch()
    assert any("rooms run in a circle" in line for line in violations(tmp_path))
