"""Every example in a docstring of the package, Megatron's folder apart, gives what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import renio_megatron

OPTIONAL = {"triton"}
MODULES = [
    "renio_megatron",
    *(
        module.name
        for module in pkgutil.walk_packages(renio_megatron.__path__, "renio_megatron.", onerror=lambda name: None)
        if not f"{module.name}.".startswith("renio_megatron.megatron.") and not module.name.endswith("__main__")
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in OPTIONAL:
            pytest.skip(f"{error.name} is not installed")
        raise
    result = doctest.testmod(module)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples; pytest shows them above"


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = (
        "losses.distillation",
        "losses.token_logp",
        "objective.weightings.renio",
        "objective.normalize",
    )
    modules = [importlib.import_module(f"renio_megatron.{name}") for name in names]
    assert sum(len(test.examples) for module in modules for test in finder.find(module)) >= 10
