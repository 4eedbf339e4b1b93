"""The CPU shim: installed when asked, once, and needed for known calls only. One launch of 2 ranks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.multiprocess import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim does nothing where CUDA is")

# Every call that a build and a training step need a patch for. A new name here is a new dependence on CUDA: look at it.
EXPECTED_CALLS = {
    "torch.cuda.current_device",
    "Tensor.type()",
    "torch.tensor(device='cuda')",
    "torch.zeros(device='cuda')",
    "torch.cuda.current_stream",  # asked for by the DDP of megatron-core 0.19
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
        "import renio_megatron, renio_megatron.loss; renio_megatron.distillation_loss",
        "import renio_megatron.build, renio_megatron.megatron.cpu, renio_megatron.megatron.start",
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

    from renio_megatron.megatron import cpu

    modules = [importlib.import_module(f"megatron.core.{name}") for name in cpu._MODULES_WITH_LITERAL_CUDA]
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
    from renio_megatron.megatron import cpu

    original = patched()
    cpu.install()
    once = patched()
    cpu.install()
    twice = patched()
    changed = [a is not b for a, b in zip(original, once, strict=True)]
    changed_again = [a is not b for a, b in zip(once, twice, strict=True)]
    metrics = train_one_step()
    calls = set(cpu.CALLS)
    cpu.CALLS.clear()
    with_experts = train_one_step(experts=True)
    return changed, changed_again, (calls, metrics), (set(cpu.CALLS), with_experts)


def train_one_step(*, experts=False):
    from renio_megatron.algorithms.sft import token_cross_entropy
    from renio_megatron.megatron.architecture import Architecture, Experts
    from renio_megatron.megatron.learner import MegatronLearner
    from renio_megatron.megatron.model import build_model
    from renio_megatron.megatron.start import start
    from renio_megatron.records import Prompt, Rollout
    from renio_megatron.settings import ParallelConfig, TrainConfig

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
        rotary_base=10000.0,
        rope_scaling_factor=None,
        max_sequence_length=64,
        experts=Experts(4, 2, 24) if experts else None,
    )
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=experts)
    layout = start(parallel, seed=0)
    part = build_model(architecture, layout, parallel, TrainConfig(), vocab_size=11)
    learner = MegatronLearner(part, TrainConfig(micro_batch_size=2), parallel, temperature=1.0, pad_id=0)
    rollouts = [Rollout(Prompt(i, (1, 2), (1, 2)), (3 + i, 4, 5)) for i in range(4)]
    return learner.update(learner.arrange(rollouts), token_cross_entropy, step=1, lr=1e-3)


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(install_twice_and_train, 2, timeout=180.0)


def test_an_installation_patches_and_a_second_one_does_not(two_ranks):
    for changed, changed_again, *_ in two_ranks:
        assert all(changed[:8]) and any(changed[8:])
        assert not any(changed_again)


def test_a_training_step_needs_only_known_patches(two_ranks):
    for _, _, dense, with_experts in two_ranks:
        for (calls, metrics), expected in ((dense, EXPECTED_CALLS), (with_experts, EXPECTED_WITH_EXPERTS)):
            assert metrics["grad_norm"] > 0.0
            assert calls and calls <= expected
        assert with_experts[0] >= EXPECTED_WITH_EXPERTS - EXPECTED_CALLS


@pytest.mark.parametrize(("source", "message"), [("raise RuntimeError('half')", "RuntimeError: half"), ("", None)])
def test_a_broken_transformer_engine_is_named(tmp_path, monkeypatch, source, message):
    from renio_megatron.errors import ConfigError
    from renio_megatron.megatron.start import check_transformer_engine

    (tmp_path / "transformer_engine.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    if message is None:
        assert check_transformer_engine() is True
        del sys.modules["transformer_engine"]
    else:
        with pytest.raises(ConfigError, match=message):
            check_transformer_engine()
