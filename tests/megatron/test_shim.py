"""The CPU shim: installed when asked, once, and needed for known calls only. One launch of 2 ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from renio_megatron.errors import ConfigError
from renio_megatron.megatron.runtime.initialize import check_transformer_engine
from tests.helpers.jobs import python_path
from tests.helpers.multiprocess import run_ranks
from tests.megatron import te_imports

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim does nothing where CUDA is")

# Every call that a build and a training step need a patch for. A new name here is a new dependence on CUDA: look at it.
EXPECTED_CALLS = {
    "torch.cuda.current_device",
    "Tensor.type()",
    "torch.tensor(device='cuda')",
    "torch.zeros(device='cuda')",
    "torch.cuda.current_stream",  # asked for by the DDP of megatron-core 0.19
    "functions of Transformer Engine or Apex",  # where one of them is installed
}
EXPECTED_WITH_EXPERTS = EXPECTED_CALLS | {
    "torch.cuda.stream",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
    "gather of uneven pieces",
    "reduce-scatter of uneven pieces",
}

IMPORTS = """
import json, sys, torch
before = [torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.get_rng_state, torch.cuda.random.get_rng_state,
          torch.cuda.current_stream, torch.cuda.default_stream, torch.Tensor.cuda, torch.Tensor.type, torch.zeros]
{imports}
after = [torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.get_rng_state, torch.cuda.random.get_rng_state,
         torch.cuda.current_stream, torch.cuda.default_stream, torch.Tensor.cuda, torch.Tensor.type, torch.zeros]
megatron = sorted(name for name in sys.modules if name.split(".")[0] == "megatron")
print(json.dumps([[a is b for a, b in zip(before, after)], megatron]))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import renio_megatron, renio_megatron.losses.distillation; renio_megatron.distillation_loss",
        "from renio_megatron.runner import build\nfrom renio_megatron.megatron.runtime import cpu_patches, initialize",
    ],
)
def test_an_import_patches_nothing_and_leaves_megatron_out(imports):
    code = IMPORTS.format(imports=imports)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    same, megatron = json.loads(done.stdout.splitlines()[-1])
    assert len(same) == 9 and all(same)
    assert megatron == []


def patched():
    """Everything that the shim replaces, in a fixed order."""
    import importlib

    from renio_megatron.megatron.runtime import cpu_patches

    modules = [importlib.import_module(f"megatron.core.{name}") for name in cpu_patches._MODULES_WITH_LITERAL_CUDA]
    functions = [
        torch.cuda.current_device,
        torch.cuda.synchronize,
        torch.cuda.get_rng_state,
        torch.cuda.random.get_rng_state,
        torch.cuda.current_stream,
        torch.cuda.default_stream,
        torch.Tensor.cuda,
        torch.Tensor.type,
    ]
    return functions + [getattr(module, "torch", None) for module in modules]


def install_twice_and_train():
    """(what the first and the second installation changed, names of the calls counted, metrics; with experts)."""
    from renio_megatron.megatron.runtime import cpu_patches

    original = patched()
    cpu_patches.install()
    once = patched()
    cpu_patches.install()
    twice = patched()
    changed = [a is not b for a, b in zip(original, once, strict=True)]
    changed_again = [a is not b for a, b in zip(once, twice, strict=True)]
    metrics = train_one_step()
    calls = set(cpu_patches.CALLS)
    cpu_patches.CALLS.clear()
    with_experts = train_one_step(experts=True)
    return changed, changed_again, (calls, metrics), (set(cpu_patches.CALLS), with_experts), recompute()


def recompute():
    """(gradient of a recomputed square at 3, calls that it left for when CUDA is initialized)."""
    from megatron.core.tensor_parallel import random

    before = len(torch.cuda._queued_calls)
    x = torch.tensor(3.0, requires_grad=True)
    random.checkpoint(torch.square, False, x).backward()
    return x.grad.item(), len(torch.cuda._queued_calls) - before


OPTIMIZER = """
import importlib, json, sys, types
if {has_te}:
    from tests.fakes import te_standin
    te_standin.install()
    sys.modules["transformer_engine.pytorch.module.base"].get_workspace = None
    sys.modules["transformer_engine.pytorch.cpp_extensions"] = types.SimpleNamespace(general_gemm=None)
else:
    sys.modules.update(dict.fromkeys(("transformer_engine", "transformer_engine_torch", "apex", "amp_C")))
from renio_megatron.megatron.runtime import cpu_patches as cpu
import megatron.core.optimizer
from megatron.core.transformer.moe import moe_utils
before = [megatron.core.optimizer.Adam.__name__, getattr(moe_utils, "te_general_gemm", None) is None]
cpu.install()
names = ("optimizer", "optimizer.distrib_optimizer", "optimizer.optimizer", "optimizer.clip_grads")
found = {{name: vars(importlib.import_module("megatron.core." + name)) for name in names}}
found = {{
    name: {{
        key: getattr(value, "__qualname__", repr(value))
        for key, value in values.items()
        if not key.startswith("_") and (value is None or isinstance(value, bool) or hasattr(value, "__qualname__"))
    }}
    for name, values in found.items()
}}
patched = cpu.CALLS["functions of Transformer Engine or Apex"]
print(json.dumps([before, patched, found, getattr(moe_utils, "te_general_gemm", None)]))
"""


def test_the_optimizer_is_the_one_of_an_environment_without_transformer_engine():
    """Every class, function and flag of the modules is what Megatron chooses itself where nothing else imports."""
    answers = []
    for has_te in (True, False):
        code = OPTIMIZER.format(has_te=has_te)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": python_path()},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    (with_te, patched_once, found, product), (without_te, not_patched, expected, _) = answers
    assert (with_te, without_te) == (["FusedAdam", False], ["AdamW", True])
    assert (patched_once, not_patched, product) == (1, 0, None)
    for name, values in expected.items():
        extra = {"multi_tensor_l2norm", "multi_tensor_scale", "multi_tensor_scale_tensor"}  # imported, then renamed
        assert {key: value for key, value in found[name].items() if key not in extra} == {
            key: value for key, value in values.items() if key in found[name]
        }


def train_one_step(*, experts=False):
    from renio_megatron.config import ParallelConfig, TrainConfig
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.megatron.student.learner import MegatronLearner
    from renio_megatron.models.architecture import Architecture, Experts
    from renio_megatron.models.rope import Rope
    from renio_megatron.training.algorithms.sft import token_cross_entropy
    from renio_megatron.types import Prompt, Rollout

    architecture = Architecture(
        family="qwen3",
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=4,
        layernorm_epsilon=1e-6,
        qk_layernorm=True,
        add_qkv_bias=False,
        init_method_std=0.1,
        vocab_size=11,
        tied=True,
        rope=Rope(),
        max_sequence_length=64,
        experts=Experts(4, 2, 24) if experts else None,
    )
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=experts)
    layout = start(parallel, seed=0)
    part = build_model(architecture, layout, parallel, TrainConfig(), vocab_size=11)
    learner = MegatronLearner(part, TrainConfig(micro_batch_size=2), parallel, temperature=1.0, pad_id=0)
    rollouts = [Rollout(Prompt(i, (1, 2), (1, 2)), (3 + i, 4, 5)) for i in range(4)]
    return learner.update(learner.make_micro_batches(rollouts), token_cross_entropy, step=1, lr=1e-3)


@pytest.fixture(scope="module")
def installed():
    return run_ranks(install_twice_and_train, 2, timeout=180.0, fresh=True)


def test_an_installation_patches_and_a_second_one_does_not(installed):
    for changed, changed_again, *_ in installed:
        assert all(changed[:8]) and any(changed[8:])
        assert not any(changed_again)


def test_a_training_step_needs_only_known_patches(installed):
    for _, _, dense, with_experts, _ in installed:
        for (calls, metrics), expected in ((dense, EXPECTED_CALLS), (with_experts, EXPECTED_WITH_EXPERTS)):
            assert metrics["grad_norm"] > 0.0
            assert calls and calls <= expected
        assert with_experts[0] >= EXPECTED_WITH_EXPERTS - EXPECTED_CALLS


def test_a_recomputed_layer_leaves_nothing_behind(installed):
    """CUDA is never initialized here: a long run would keep a stack for every layer of every step."""
    assert [recomputed for *_, recomputed in installed] == [(6.0, 0)] * 2


@pytest.mark.parametrize(
    ("source", "pytorch", "message"),
    [
        ("raise RuntimeError('half')", "", "RuntimeError: half"),
        ("", "import a_package_that_is_missing", "transformer_engine.pytorch .* named 'a_package_that_is_missing'"),
        ("", None, "No module named 'transformer_engine.pytorch'"),
        ("", "", None),
    ],
)
def test_a_broken_transformer_engine_is_named(tmp_path, monkeypatch, source, pytorch, message):
    te_imports.put(monkeypatch, tmp_path, source, pytorch)
    if message is None:
        assert check_transformer_engine() is True
    else:
        with pytest.raises(ConfigError, match=message):
            check_transformer_engine()
    te_imports.forget(monkeypatch)


def test_a_missing_transformer_engine_is_not_missed(monkeypatch):
    te_imports.hide(monkeypatch)
    assert check_transformer_engine() is False
