"""Loading by slices: every rank's parameters bit for bit, the bytes and files that it costs, and what is refused.

One process: a rank is a number here, and its parameters come from a table of shapes and Megatron's partition marks.
The same through real ranks and models: test_hf.py.
"""

from __future__ import annotations

import itertools
import json
import types
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from renio_megatron.errors import ConfigError
from renio_megatron.megatron.weights import hf
from renio_megatron.models import hf_weights
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.hf_weights import WeightFiles, hf_shapes
from renio_megatron.models.param_map import hf_names
from renio_megatron.models.rope import Rope
from tests.helpers.whole_tensors import take_shard, to_megatron

VOCAB, HIDDEN, FFN, WIDTH, LAYERS, NUM_FILES = 37, 32, 48, 6, 8, 64
FAMILIES = {  # name: (family, heads, query groups, tied, bias, norms of queries and keys)
    "llama": ("llama", 8, 4, False, False, False),
    "one query a group, tied": ("llama", 4, 4, True, False, False),
    "qwen2": ("qwen2", 8, 4, False, True, False),
    "qwen3, tied": ("qwen3", 8, 4, True, False, True),
}
PLACES = [  # (tensor ranks, stages)
    (1, 1),
    (2, 1),
    (4, 1),
    (1, 2),
    (2, 2),
]


def make_architecture(name):
    family, heads, groups, tied, bias, norms = FAMILIES[name]
    shape = {"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "kv_channels": WIDTH}
    shape |= {"num_attention_heads": heads, "num_query_groups": groups, "vocab_size": VOCAB, "tied": tied}
    shape |= {"add_qkv_bias": bias, "qk_layernorm": norms, "layernorm_epsilon": 1e-6, "init_method_std": 0.02}
    rest = {"rope": Rope(), "max_sequence_length": 64}
    return Architecture(family=family, **shape, **rest)


def write(directory, state, num_files=NUM_FILES, **index_changes):
    """Tensors dealt to files one after another, as save_pretrained does it."""
    directory.mkdir()
    names, where = list(state), {}
    for number in range(num_files):
        mine = names[number * len(names) // num_files : (number + 1) * len(names) // num_files]
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        save_file({name: state[name] for name in mine}, directory / file)
        where |= dict.fromkeys(mine, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where | index_changes}))
    return directory


def random_state(architecture, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = hf_shapes(architecture)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """(directory of 64 files, architecture, its tensors) by name of `FAMILIES`."""
    root, found = tmp_path_factory.mktemp("sliced"), {}
    for name in FAMILIES:
        architecture = make_architecture(name)
        state = random_state(architecture)
        found[name] = write(root / name, state), architecture, state
    return found


def rank_of(architecture, tensor, stages, rank, stage, *, padded=VOCAB + 11, dtype=torch.float32, fused=False):
    """What a loader sees of a rank: named parameters of Megatron's shapes and marks, full of NaN.

    Args:
        fused: Transformer Engine's names, where norms belong to the layers after them.
    """
    heads, groups = architecture.num_attention_heads * WIDTH, architecture.num_query_groups * WIDTH
    table = {  # name: (whole shape, dimension that is cut)
        "input_layernorm.weight": ((HIDDEN,), None),
        "self_attention.linear_proj.weight": ((HIDDEN, heads), 1),
        "self_attention.linear_qkv.weight": ((heads + 2 * groups, HIDDEN), 0),
        "pre_mlp_layernorm.weight": ((HIDDEN,), None),
        "mlp.linear_fc1.weight": ((2 * FFN, HIDDEN), 0),
        "mlp.linear_fc2.weight": ((HIDDEN, FFN), 1),
    }
    if fused:
        table["self_attention.linear_qkv.layer_norm_weight"] = table.pop("input_layernorm.weight")
        table["mlp.linear_fc1.layer_norm_weight"] = table.pop("pre_mlp_layernorm.weight")
    if architecture.add_qkv_bias:
        table["self_attention.linear_qkv.bias"] = ((heads + 2 * groups,), 0)
    if architecture.qk_layernorm:
        table |= {f"self_attention.{x}_layernorm.weight": ((WIDTH,), None) for x in "qk"}
    per_stage = LAYERS // stages
    numbers = range(stage * per_stage, (stage + 1) * per_stage)
    whole = {f"decoder.layers.{number}.{name}": value for number in numbers for name, value in table.items()}
    rows = -(-padded // tensor) * tensor
    if stage == 0:
        whole["embedding.word_embeddings.weight"] = ((rows, HIDDEN), 0)
    if stage == stages - 1:
        whole["decoder.final_layernorm.weight"] = ((HIDDEN,), None)
        if not architecture.tied or stages > 1:
            whole["output_layer.weight"] = ((rows, HIDDEN), 0)
    parameters = {}
    for name, (shape, dim) in whole.items():
        mine = tuple(size // tensor if number == dim else size for number, size in enumerate(shape))
        parameter = torch.nn.Parameter(torch.full(mine, float("nan"), dtype=dtype))
        parameter.tensor_model_parallel, parameter.partition_dim = dim is not None, dim
        parameters[name] = parameter
    place = types.SimpleNamespace(tensor=types.SimpleNamespace(rank=rank, size=tensor))
    return types.SimpleNamespace(
        architecture=architecture, layout=place, parameters=parameters, named_parameters=parameters.items
    )


def check_parameters(part, state):
    """Compares every parameter with the whole tensors, merged and cut."""
    for name, parameter in part.parameters.items():
        whole = to_megatron(name, [state[key] for key in hf_names(name, part.architecture)], part.architecture)
        tensor = part.layout.tensor
        expected = take_shard(name, whole, parameter, tensor.rank, tensor.size)
        assert torch.equal(parameter, expected.to(parameter.dtype)), name


def own_bytes(part):
    """Of a rank's parameters in bf16, rows of the padded vocabulary left out."""
    total = 0
    for name, parameter in part.parameters.items():
        rows, width = parameter.shape[0], parameter.numel() // parameter.shape[0]
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            rows = max(0, min(VOCAB - part.layout.tensor.rank * rows, rows))
        total += 2 * rows * width
    return total


@pytest.mark.parametrize("fused", [False, True], ids=["local", "te"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"TP{place[0]}xPP{place[1]}")
@pytest.mark.parametrize("name", FAMILIES)
def test_each_rank_reads_its_own_bytes_into_the_right_places(directories, name, place, fused):
    directory, architecture, state = directories[name]
    tensor, stages = place
    total = 0
    for rank in range(tensor):
        for stage in range(stages):
            part = rank_of(architecture, tensor, stages, rank, stage, fused=fused)
            read = hf.load_weights(part, directory)
            check_parameters(part, state)
            assert read == own_bytes(part)
            total += read
    norms = sum(2 * tensor_.numel() for key, tensor_ in state.items() if "norm" in key)
    twice = 2 * VOCAB * HIDDEN if architecture.tied and stages > 1 else 0
    whole = sum(2 * tensor_.numel() for tensor_ in state.values())
    assert total == whole + (tensor - 1) * norms + twice  # all ranks together: each tensor once, the norms on each


@pytest.mark.parametrize("chunk_bytes", [1, 300, 2**20])
@pytest.mark.parametrize("padded", [29, 37, 160], ids=["cut", "exact", "ranks of padding only"])
def test_chunks_and_vocabularies(directories, monkeypatch, chunk_bytes, padded):
    directory, architecture, state = directories["qwen2"]
    monkeypatch.setattr(hf, "CHUNK_BYTES", chunk_bytes)
    for rank in range(4):
        part = rank_of(architecture, 4, 1, rank, 0, padded=padded, dtype=torch.bfloat16)
        assert hf.load_weights(part, directory) == own_bytes(part)
        check_parameters(part, state)


def test_a_file_is_opened_once_and_only_where_it_is_needed(directories, monkeypatch):
    directory, architecture, _ = directories["llama"]
    opened, open_file = Counter(), WeightFiles.open
    monkeypatch.setattr(WeightFiles, "open", lambda self, file: opened.update([file]) or open_file(self, file))
    WeightFiles(directory).check(architecture)
    assert opened.total() == len(opened) == NUM_FILES  # the headers of all
    in_stage = []
    for stage in range(2):
        opened.clear()
        hf.load_weights(rank_of(architecture, 1, 2, 0, stage), directory)
        assert set(opened.values()) == {1, 2}
        in_stage.append({file for file, count in opened.items() if count == 2})
    assert len(in_stage[0] | in_stage[1]) == NUM_FILES
    assert len(in_stage[0] & in_stage[1]) <= 1


def test_a_file_is_read_from_begin_to_end_with_a_parameter_s_slices_together(directories, monkeypatch, tmp_path):
    _, architecture, state = directories["qwen2"]
    directory, read, read_slice = write(tmp_path / "one", state, 1), [], WeightFiles.read
    monkeypatch.setattr(
        WeightFiles, "read", lambda self, handle, one: read.append(one) or read_slice(self, handle, one)
    )
    part = rank_of(architecture, 2, 1, 1, 0)
    hf.load_weights(part, directory)
    with WeightFiles(directory).open("model-00001-of-00001.safetensors") as handle:
        order = handle.offset_keys()
    owner = {key: name for name in part.parameters for key in hf_names(name, architecture)}
    places = [(order.index(one.tensor), one.start) for one in read]
    runs = [list(run) for _, run in itertools.groupby(zip(read, places, strict=True), lambda x: owner[x[0].tensor])]
    assert len(runs) == len(part.parameters)
    assert all([place for _, place in run] == sorted(place for _, place in run) for run in runs)
    assert [run[0][1] for run in runs] == sorted(run[0][1] for run in runs)


class InLine:
    """Stands in for the threads, so that what they do can be watched."""

    def __init__(self, num_threads):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Allocations(TorchDispatchMode):
    """Bytes of the largest memory that an operation made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        given |= {storage.data_ptr() for storage in args if isinstance(storage, torch.UntypedStorage)}  # a mapped file
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.nbytes)
        return result


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("tensor", [1, 2])
def test_nothing_is_made_beside_the_parameters(directories, monkeypatch, tensor, is_quantized):
    directory, architecture, state = directories["qwen3, tied"]
    monkeypatch.setattr(hf, "ThreadPoolExecutor", InLine)
    filled, waiting = [], 0
    if is_quantized:
        monkeypatch.setattr(hf, "is_quantized", lambda parameter: parameter.dim() == 2)
        monkeypatch.setattr(hf, "fill", lambda parameter, values: filled.append(parameter.copy_(values)))
    write_slice = hf._Target.write

    def write_and_count(target, one, values):
        nonlocal waiting
        write_slice(target, one, values)
        waiting = max(waiting, sum(t._values is not None for t in targets))

    targets, make_targets = [], hf._targets
    monkeypatch.setattr(hf, "_targets", lambda part: targets.extend(make_targets(part)) or targets)
    monkeypatch.setattr(hf._Target, "write", write_and_count)
    part = rank_of(architecture, tensor, 1, tensor - 1, 0)
    with Allocations() as made:
        hf.load_weights(part, directory)
    check_parameters(part, state)
    local = max(parameter.nbytes for parameter in part.parameters.values())
    if not is_quantized:
        assert made.largest <= 8  # a least and a greatest number
        return
    matrices = [parameter for parameter in part.parameters.values() if parameter.dim() == 2]
    assert len(filled) == len(matrices) and 0 < made.largest <= local
    # A few tensors a file, so that most parameters lie in two or three files: each waits for its own, not for others'.
    assert waiting - (len(part.parameters) - len(matrices)) <= 2


def refusal_of(directory, architecture):
    with pytest.raises(ConfigError) as caught:
        hf.load_weights(rank_of(architecture, 1, 1, 0, 0), directory)
    return str(caught.value)


def test_surplus_tensors_are_named(directories, tmp_path):
    _, architecture, state = directories["llama"]
    extra = {f"model.layers.{number}.mlp.down_proj.bias": torch.zeros(HIDDEN) for number in range(5)}
    message = refusal_of(write(tmp_path / "many", state | extra), architecture)
    assert "does not ask for 'model.layers.0.mlp.down_proj.bias'," in message and " and 2 more, which" in message
    message = refusal_of(write(tmp_path / "one file", state | {"visual.proj.weight": torch.zeros(1)}, 1), architecture)
    assert "'visual.proj.weight', which" in message
    message = refusal_of(write(tmp_path / "index", state, **{"a.weight": "elsewhere.safetensors"}), architecture)
    assert "'a.weight', which" in message
    directory = write(tmp_path / "not in the index", state | {"b.weight": torch.zeros(1)})
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["b.weight"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "'b.weight', which" in refusal_of(directory, architecture)


def test_harmless_surplus_is_passed_over(directories, tmp_path):
    _, architecture, state = directories["qwen3, tied"]
    extra = {f"model.layers.{number}.self_attn.rotary_emb.inv_freq": torch.zeros(3) for number in range(LAYERS)}
    extra["lm_head.weight"] = torch.zeros(VOCAB, HIDDEN)
    part = rank_of(architecture, 1, 1, 0, 0)
    assert hf.load_weights(part, write(tmp_path / "extra", state | extra)) == own_bytes(part)
    check_parameters(part, state)


def test_a_wrong_index_and_a_wrong_dtype_are_named(directories, tmp_path):
    directory, architecture, state = directories["llama"]
    first = f"model-00001-of-{NUM_FILES:05d}.safetensors"
    message = refusal_of(write(tmp_path / "index", state, **{"model.norm.weight": first}), architecture)
    assert "hold no 'model.norm.weight'" in message
    whole = {"model.norm.weight": torch.zeros(HIDDEN, dtype=torch.int8)}
    message = refusal_of(write(tmp_path / "dtype", state | whole), architecture)
    assert "model.norm.weight is kept as I8" in message
    assert WeightFiles(directory).bytes_read == 0


def test_the_progress_line(directories, monkeypatch):
    directory, architecture, _ = directories["llama"]
    lines = []
    hf.load_weights(rank_of(architecture, 1, 1, 0, 0), directory, title="teacher", report=lines.append)
    assert lines == []
    monkeypatch.setattr(hf, "LINE_INTERVAL_S", 0.0)
    hf.load_weights(rank_of(architecture, 1, 1, 0, 0), directory, title="teacher", report=lines.append)
    assert lines[0] == "teacher: 0 of 64 files, 0.0 of 0.0 GB"
    assert lines[-1] == "teacher: 64 of 64 files, 0.0 of 0.0 GB"
    assert lines.count(lines[-1]) <= 3


def test_the_progress_line_keeps_its_interval():
    now, lines, files = [0.0], [], types.SimpleNamespace(bytes_read=0)
    line = hf._Line("teacher", files, 64, 16_000_000_000, lines.append, clock=lambda: now[0])
    for now[0], files.bytes_read, done in ((1.9, 10**9, 1), (2.1, 3_100_000_000, 11), (3.0, 4 * 10**9, 1)):
        line.update(done)
    assert lines == ["teacher: 12 of 64 files, 3.1 of 16.0 GB"]
    line.end()
    assert lines[1:] == ["teacher: 13 of 64 files, 4.0 of 16.0 GB"]


def test_every_dtype_that_is_allowed_is_counted_and_cast(directories, tmp_path):
    _, architecture, state = directories["llama"]
    for kind, dtype in (("F32", torch.float32), ("F16", torch.float16), ("F64", torch.float64)):
        wide = {key: tensor.to(dtype) for key, tensor in state.items()}
        part = rank_of(architecture, 2, 1, 1, 0, dtype=torch.bfloat16)
        read = hf.load_weights(part, write(tmp_path / kind, wide, 2))
        assert 2 * read == hf_weights._ITEM_BYTES[kind] * own_bytes(part)
        check_parameters(part, wide)
