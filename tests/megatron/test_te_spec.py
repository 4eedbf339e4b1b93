"""Models of Transformer Engine's modules, through a stand-in that computes on the CPU, and the errors without it.

On 2 ranks: layouts in full precision, a distillation step, checkpoints, FP8. What the stand-in promises of
Transformer Engine is written in tests/fakes/te_standin.py; nothing here has met the real one.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import types
from dataclasses import replace

import pytest
import torch

from renio_megatron.config import ParallelConfig, PrecisionConfig, TeacherPrecisionConfig, TrainConfig
from renio_megatron.data.batching.collate import BatchLayout
from renio_megatron.errors import ConfigError
from renio_megatron.megatron.model import backend
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.rope import Rope
from renio_megatron.runner.environment import describe_layers
from tests.helpers import training_cases
from tests.helpers.multiprocess import Ranks
from tests.megatron import te_cases, te_imports, te_start_cases

pytestmark = pytest.mark.timeout(600)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TE_KINDS = ["RMSNorm", "TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    te_cases.save_models(folder)
    training_cases.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(root):
    with Ranks(2, timeout=240.0, fresh=True) as ranks:
        ranks.once(te_start_cases.run_all, root)  # first: of what is said once
        yield ranks


@pytest.fixture(scope="module")
def fp8(root, ranks):
    return ranks(te_cases.in_fp8, root)


@pytest.mark.matrix(2)
def test_a_model_of_transformer_engine_computes_what_a_local_one_does(root, ranks):
    for found in ranks(te_cases.same_as_local, root):
        assert len(found) == len(te_cases.FAMILIES) * (2 * len(te_cases.LAYOUTS) + 2)
        for key, one in found.items():
            assert set(TE_KINDS) - {"RMSNorm"} <= set(one["kinds"]), (key, one)
            assert not {"SdpaCoreAttention", "RowParallelLinear"} & set(one["kinds"]), (key, one)
            assert one["tokens"] and not one["strange names"], (key, one)
            assert max(one["logp"], one["sampled logp"], one["gradient"]) < 1e-5, (key, one)


def test_a_distillation_step_is_that_of_transformers(root, ranks):
    for found in ranks(te_cases.distil, root):
        for key, one in found.items():
            assert max(one["loss_error"], one["weight_error"], one["gradient_error"]) < 1e-5, (key, one)
            assert one["raw_weights_not_1"] > 0


@pytest.fixture(scope="module")
def started(root, ranks):
    return ranks.once(te_start_cases.run_all, root)


def test_attention_without_a_fused_kernel_is_said_once_by_one_rank(started):
    assert [found["attention"] for found in started] == [[0, 1, 0], [0, 0, 0, "not the main rank"]]


def test_weights_in_fp8_and_their_fp32_copies_begin_from_a_checkpoint(started):
    for found in started:
        assert found["checkpoint"]["same"] and found["checkpoint"]["number"] > 16
        assert found["checkpoint"]["initial"] == (16, True)


def test_a_student_with_adapters_has_local_layers_beside_a_teacher_of_transformer_engine(started):
    for found in started:
        assert found["student"] == "local"
        assert found["adapters"] > 0
        assert found["kinds"].isdisjoint({"TELayerNormColumnParallelLinear", "TEDotProductAttention"})
        assert (found["teacher"], found["without adapters"]) == ("te", "te")
        assert found["grad_norm"] > 0
        assert "precision.backend=local" in found["asked for te"]


@pytest.mark.matrix(2)
def test_exports_and_checkpoints_of_either_backend_hold_the_same_tensors(root, ranks):
    for found in ranks(te_cases.exported, root):
        assert len(found) == 14
        assert all(value is True for value in found.values()), found


@pytest.mark.matrix(2)
def test_fp8_runs_in_every_layout_and_is_near(root, ranks):
    for found in ranks(te_cases.in_fp8_by_layout, root):
        assert len(found) == 20
        for key, (difference, cosine) in found.items():
            assert 1e-4 < difference < 0.3, (key, difference)  # rounding is there, and is rounding
            assert cosine > 0.75, (key, cosine)


def test_layers_are_in_fp8_as_asked(fp8):
    fp8_layer, bf16_layer = [True] * 4, [False] * 4
    mixed = [*bf16_layer, *fp8_layer, *bf16_layer, *bf16_layer]  # one layer at the start, two at the end
    for found in fp8:
        assert found["layers"] == [fp8_layer * 4, mixed, bf16_layer * 4]
        flags, kept, rounding = found["teacher"]
        assert flags == mixed and kept == [1] and rounding == 0.0
        assert found["student's weights"] == [] and found["teacher's initial values"] == 0


def test_weights_gathered_in_fp8_begin_from_the_loaded_values(fp8):
    for found in fp8:
        kept, (count, loaded) = found["gathered"]
        assert kept == [0, 1, 2, 3] and count == 16 and loaded


def test_decoding_in_fp8_reads_the_present_weights(fp8):
    assert all(found["stale"] for found in fp8)


def test_shapes_that_fp8_refuses_are_padded(fp8):
    for found in fp8:
        assert found["unpadded"] == ["refused", "refused"]
        assert found["rows"] == [16]


def test_recomputation_under_fp8_changes_nothing(fp8):
    assert all(found["recomputed"] == 0.0 for found in fp8)


@pytest.fixture(params=[None, "raise RuntimeError('half of it')"])
def te_installed(request, tmp_path, monkeypatch):
    """Whether an import of Transformer Engine finds nothing or fails; what stands there."""
    if request.param is None:
        te_imports.hide(monkeypatch)
    else:
        te_imports.put(monkeypatch, tmp_path, request.param)
    backend.te_problem.cache_clear()
    yield request.param
    backend.te_problem.cache_clear()


def test_without_transformer_engine_nothing_is_taken_for_it(te_installed):
    problem = "half of it" if te_installed else "No module named 'transformer_engine'"
    for device, bf16 in itertools.product((CPU, CUDA), (True, False)):
        assert backend.resolve_backend(PrecisionConfig(), device, bf16=bf16) == "local"
        emulating = PrecisionConfig(fp8="hybrid", emulate_fp8=True)
        assert backend.resolve_backend(emulating, device, bf16=bf16) == "local"
        for asked in (PrecisionConfig(backend="te"), PrecisionConfig(fp8="e4m3")):
            with pytest.raises(ConfigError, match=problem) as caught:
                backend.resolve_backend(asked, device, bf16=bf16)
            assert "nvcr.io/nvidia/pytorch" in str(caught.value) and "transformer-engine[pytorch]" in str(caught.value)
    with pytest.raises(ConfigError, match=r"teacher_precision\.emulate_fp8=true"):
        backend.resolve_backend(TeacherPrecisionConfig(fp8="e4m3"), CUDA, bf16=True)


def test_auto_takes_transformer_engine_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "te_problem", lambda: None)
    found = {
        (device.type, bf16): backend.resolve_backend(PrecisionConfig(), device, bf16=bf16)
        for device, bf16 in itertools.product((CPU, CUDA), (True, False))
    }
    assert found == {("cuda", True): "te", ("cuda", False): "local", ("cpu", True): "local", ("cpu", False): "local"}
    assert backend.resolve_backend(PrecisionConfig(backend="te"), CPU, bf16=False) == "te"
    assert backend.resolve_backend(PrecisionConfig(backend="local"), CUDA, bf16=True) == "local"
    with pytest.raises(ConfigError, match=r"precision\.fp8=e4m3 needs a GPU"):
        backend.resolve_backend(PrecisionConfig(fp8="e4m3"), CPU, bf16=True)
    for precision, expected in ((PrecisionConfig(), "local"), (PrecisionConfig(backend="te"), "te")):
        assert backend.resolve_backend(precision, CUDA, bf16=True, has_adapters=True) == expected


def test_weight_gradients_are_fused_where_apex_is(monkeypatch):
    assert not backend.can_fuse_weight_gradients(CUDA, bf16=True)
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", types.ModuleType("apex's"))
    found = [backend.can_fuse_weight_gradients(device, bf16=bf16) for device in (CUDA, CPU) for bf16 in (True, False)]
    assert found == [True, False, False, False]


def test_a_run_says_what_it_computes_in(monkeypatch):
    monkeypatch.setattr(backend, "te_problem", lambda: None)
    teacher = TeacherPrecisionConfig(fp8="hybrid", fp8_recipe="blockwise", first_last_layers_bf16=True)
    assert describe_layers(PrecisionConfig(), teacher, CUDA, bf16=True) == (
        "layers: student te bf16, teacher te bf16 with FP8 hybrid blockwise but 1 first and 1 last layers"
    )
    assert describe_layers(PrecisionConfig(), None, CUDA, bf16=False) == "layers: student local fp32"
    assert describe_layers(PrecisionConfig(), TeacherPrecisionConfig(), CUDA, bf16=True, has_adapters=True) == (
        "layers: student local bf16 (Transformer Engine's layers take no adapters), teacher te bf16"
    )
    chosen = describe_layers(PrecisionConfig(backend="local"), None, CUDA, bf16=True, has_adapters=True)
    assert chosen == "layers: student local bf16"


def test_rows_are_padded_for_each_rank_that_computes_on_a_piece():
    kinds = {(1, 1): 16, (2, 1): 32, (1, 2): 32, (2, 2): 64}  # (tensor pieces, context ranks): tokens
    for (pieces, ranks), multiple in kinds.items():
        assert BatchLayout(0, sp_size=pieces, cp_size=ranks, piece_multiple=16).row_multiple == multiple


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "words"),
    [
        ("tensorwise", (9, 0), "12.4", None),
        ("delayed", (8, 9), "12.4", None),
        ("blockwise", (9, 0), "12.9", None),
        ("blockwise", (10, 0), "13.0", None),
        ("mxfp8", (10, 0), "12.8", None),
        ("mxfp8", (10, 3), "13.0", None),
        ("tensorwise", (8, 0), "12.9", ["8.9 or higher", "has 8.0", "emulate_fp8"]),
        ("tensorwise", (7, 0), "12.9", ["8.9 or higher"]),
        ("mxfp8", (9, 0), "12.9", ["10.x", "has 9.0", "blockwise or tensorwise"]),
        ("mxfp8", (8, 9), "12.9", ["10.x", "=tensorwise"]),
        ("mxfp8", (12, 0), "13.0", ["10.x", "has 12.0"]),
        ("blockwise", (8, 9), "12.9", ["9.0 or higher", "tensorwise"]),
        ("blockwise", (9, 0), "12.8", ["CUDA 12.9", "for 12.8"]),
        ("blockwise", (9, 0), "12.10", None),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(recipe, capability, cuda, words):
    precision = PrecisionConfig(fp8="hybrid", fp8_recipe=recipe)
    if words is None:
        backend.check_capability(precision, capability, cuda)
    else:
        with pytest.raises(ConfigError) as caught:
            backend.check_capability(precision, capability, cuda)
        assert all(word in str(caught.value) for word in words), caught.value
    backend.check_capability(replace(precision, fp8=None), capability, cuda)


@pytest.mark.parametrize(
    ("changes", "tensor", "recipe", "words"),
    [
        ({}, 1, "tensorwise", None),
        ({}, 4, "tensorwise", None),
        ({"hidden_size": 72}, 1, "tensorwise", ["hidden_size is 72", "multiples of 16"]),
        ({"ffn_hidden_size": 136}, 1, "tensorwise", ["intermediate_size", "136"]),
        ({"ffn_hidden_size": 96}, 4, "tensorwise", ["intermediate_size / tensor ranks is 24"]),
        ({"kv_channels": 8, "num_query_groups": 4}, 4, "tensorwise", ["query, key and value rows", "is 24"]),
        ({"kv_channels": 24, "num_attention_heads": 1, "num_query_groups": 1}, 1, "delayed", ["rows / tensor"]),
        ({"hidden_size": 80}, 1, "mxfp8", ["hidden_size is 80", "multiples of 32"]),
    ],
)
def test_weights_that_fp8_refuses_are_named(changes, tensor, recipe, words):
    shape = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 4}
    shape |= {"kv_channels": 16, "family": "qwen3", "num_layers": 2, "layernorm_epsilon": 1e-6, "qk_layernorm": True}
    shape |= {"add_qkv_bias": False, "init_method_std": 0.1, "vocab_size": 11, "tied": True, "rope": Rope()}
    shape |= {"max_sequence_length": 64}
    architecture, parallel = Architecture(**shape | changes), ParallelConfig(tensor_model_parallel_size=tensor)
    precision = PrecisionConfig(fp8="hybrid", fp8_recipe=recipe)
    backend.check_weight_shapes(architecture, parallel, replace(precision, fp8=None))
    if words is None:
        backend.check_weight_shapes(architecture, parallel, precision)
        return
    with pytest.raises(ConfigError) as caught:
        backend.check_weight_shapes(architecture, parallel, precision)
    assert all(word in str(caught.value) for word in words), caught.value


def test_more_layers_in_bf16_than_a_pipeline_rank_has_are_refused():
    architecture = Architecture("qwen3", 4, 64, 128, 4, 4, 16, 1e-6, True, False, 0.1, 11, True, Rope(), 64)
    parallel, train = ParallelConfig(pipeline_model_parallel_size=2), TrainConfig()
    for count in (2, 3):
        precision = PrecisionConfig(fp8="hybrid", first_last_layers_bf16=True, num_layers_at_end_in_bf16=count)
        with pytest.raises(ConfigError, match="more than the 2 layers") if count > 2 else contextlib.nullcontext():
            backend.check_model(architecture, parallel, train, precision, "te", CPU)
