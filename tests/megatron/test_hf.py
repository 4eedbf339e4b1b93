"""Hugging Face directories: read into every layout, checked against transformers, and written back bit for bit.

Launches: 2 ranks (logits, refusals, checkpoints), 4 ranks (logits), 1 rank (export). Ranks return what they measured;
transformers runs in the test's own process, in fp32, one unpadded row at a time.
"""

from __future__ import annotations

import functools
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from renio_megatron.config import ParallelConfig, TrainConfig
from renio_megatron.config.load import load_recipe
from renio_megatron.config.resume import to_yaml
from renio_megatron.data.batching.collate import BatchLayout, collate
from renio_megatron.errors import ConfigError
from renio_megatron.models.architecture import Architecture
from renio_megatron.types import Prompt, Rollout
from tests.helpers.multiprocess import run_ranks
from tests.helpers.paths import ROOT

TOLERANCE = 1e-5
VOCAB = 37
SLIDING = ["sliding_attention"] * 4
RECIPE = ROOT / "examples" / "modchain" / "student.yaml"
LAYOUTS = {2: ((1, 1), (2, 1), (1, 2)), 4: ((2, 2),)}  # (tensor, pipeline); the rest is data-parallel

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 700.0}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 700.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# With theta 700 no wave is longer than 2048 positions, so nothing would be scaled; with this one half of them are.
LLAMA3_ROPE_SLOW = LLAMA3_ROPE | {"rope_theta": 500000.0}

MODELS = {  # name: (class, tied, query groups, further settings)
    "llama": (LlamaConfig, False, 2, {}),
    "llama-tied": (LlamaConfig, True, 4, {}),
    "qwen2": (Qwen2Config, False, 4, {}),
    "qwen2-tied": (Qwen2Config, True, 2, {}),
    "qwen3": (Qwen3Config, False, 2, {"head_dim": 16}),
    "qwen3-tied": (Qwen3Config, True, 4, {"head_dim": 8}),
    "llama3-rope": (LlamaConfig, False, 2, {"rope_parameters": LLAMA3_ROPE_SLOW}),
    "bf16": (Qwen2Config, False, 2, {}),
    "sharded": (Qwen3Config, False, 2, {"head_dim": 16}),
}
CASES = {name: (name, VOCAB, 1) for name in MODELS} | {  # name: (model, V of the loss, make_vocab_size_divisible_by)
    "columns cut": ("qwen3", 29, 1),
    "columns cut, tied": ("llama-tied", 29, 1),
    "columns added": ("qwen2", 61, 1),
    "columns added, a shard empty": ("llama-tied", 80, 1),
    "padded": ("qwen3", VOCAB, 16),
    "padded, a shard empty": ("qwen2-tied", VOCAB, 64),
}
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 1024, "rms_norm_eps": 3e-3}
SHAPE |= {"rope_parameters": PLAIN_ROPE}
LENGTHS = (7, 3, 12, 5, 9, 1)


def make_model(folder, name):
    """A model in which every parameter is random, norms and biases included, as saved in `folder`; fp32."""
    config_class, tied, groups, more = MODELS[name]
    torch.manual_seed(sorted(MODELS).index(name))
    config = config_class(**SHAPE | {"tie_word_embeddings": tied, "num_key_value_heads": groups} | more)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.2)
    if name == "bf16":
        model.to(torch.bfloat16)
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if name == "sharded" else {}))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_rows(name):
    """Token ids of every row; all below 29, the narrowest vocabulary of a case."""
    generator = torch.Generator().manual_seed(1)
    lengths = (600, 40) if name == "llama3-rope" else LENGTHS
    return [torch.randint(29, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def logits_by_transformers(model, rows):
    return torch.cat([model(torch.tensor([row])).logits[0] for row in rows])


def launch(layouts, directories, refused, saves):
    """(logits of every case and layout, messages of refused directories) on this rank; writes checkpoints."""
    from renio_megatron.megatron.runtime.initialize import start

    logits, messages = {}, {}
    for tensor, pipeline in layouts:
        layout = start(parallel_config(tensor, pipeline), seed=0)  # makes process groups: once for all cases
        for case, (name, vocab_size, divisor) in CASES.items():
            part = load(directories[name], layout, parallel_config(tensor, pipeline, divisor), vocab_size)
            logits[tensor, pipeline, case] = logits_of(part, make_rows(name))
        for run, source, layout_of_run, step, new_value in saves:
            if layout_of_run == (tensor, pipeline):
                part = load(source, layout, parallel_config(tensor, pipeline), VOCAB)
                save_checkpoint(part, run, step, new_value)
        if (tensor, pipeline) == (2, 1):
            messages = {label: refusal(refused[label], layout) for label in refused}
    return logits, messages


def refusal(directory, layout):
    try:
        load(directory, layout, parallel_config(2, 1), VOCAB)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def parallel_config(tensor, pipeline, divisor=1):
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    return ParallelConfig(**sizes, make_vocab_size_divisible_by=divisor)


def load(directory, layout, parallel, vocab_size):
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.weights.hf import load_weights

    architecture = Architecture.from_directory(directory)
    build = functools.partial(build_model, architecture, layout, parallel, TrainConfig(seed=99), vocab_size=vocab_size)
    part = build(initialize=False)
    assert marks(part) == marks(build())
    with torch.no_grad():
        for _, parameter in part.named_parameters():
            parameter.fill_(float("nan"))  # the memory may have held it
    load_weights(part, directory)
    return part


def marks(part):
    """What Megatron's gradient norm and reductions ask of each parameter."""
    names = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel", "allreduce")
    return {key: [getattr(parameter, name, None) for name in names] for key, parameter in part.named_parameters()}


def logits_of(part, rows):
    """Logits at every position of every row, [positions, V], on the last stage; None elsewhere."""
    from renio_megatron.megatron.model.schedules import run_forward
    from renio_megatron.parallel.vocab import gather_columns

    # A prompt of one token: every position of the row then predicts a completion token, the last one token 0.
    rollouts = [Rollout(Prompt(i, (row[0],), (row[0],)), (*row[1:], 0)) for i, row in enumerate(rows)]
    micro_batches = collate(rollouts, audience="student", batch_layout=BatchLayout(3, micro_batch_size=2))

    def gathered(index, micro_batch, hidden_rows):
        return gather_columns(part.head_logits(hidden_rows), part.shard)

    collected = run_forward(part, micro_batches, gathered)
    return torch.cat(collected) if collected else None


def save_checkpoint(part, run, step, new_value):
    """A checkpoint of untrained weights in a run directory; `new_value` replaces an element of the final norm."""
    from renio_megatron.megatron.checkpoint.checkpointer import MegatronCheckpointer
    from renio_megatron.megatron.student.learner import MegatronLearner

    if new_value is not None and part.layout.pipeline.is_last:
        with torch.no_grad():
            part.chunks[0].decoder.final_layernorm.weight[3] = new_value
    learner = MegatronLearner(part, TrainConfig(), ParallelConfig(), temperature=1.0, pad_id=0)
    MegatronCheckpointer(run / "checkpoints", learner).save(step, {})


def export(jobs, bad_jobs):
    """Steps that were exported, and messages of exports that were refused."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.export import export_checkpoint

    steps, messages = [], []
    try:
        steps = [export_checkpoint(*job) for job in jobs]
        for job in bad_jobs:
            with pytest.raises((ConfigError, OSError)) as caught:
                export_checkpoint(*job)
            messages.append(str(caught.value))
    finally:
        start(ParallelConfig(), seed=0)  # an export leaves the world; the launcher wants to end in it
    return steps, messages


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(directory, transformers' model, its logits) of every name."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for name in MODELS:
        model = make_model(root / name, name)
        found[name] = root / name, model, logits_by_transformers(model, make_rows(name))
    return found


@pytest.fixture(scope="module")
def directories(models):
    return {name: directory for name, (directory, *_) in models.items()}


SAVES = {  # name: (model, (tensor, pipeline), step, value put into the final norm)
    "fp32 TP2": ("qwen3", (2, 1), 1, None),
    "fp32 tied PP2": ("llama-tied", (1, 2), 1, None),
    "bf16 TP2": ("bf16", (2, 1), 1, None),
    "bf16 changed PP2": ("bf16", (1, 2), 2, 1.0 + 2.0**-20),  # bf16 has 8 bits of mantissa
}


@pytest.fixture(scope="module")
def runs(directories, tmp_path_factory):
    """A run directory for each model that is saved, laid out as a run leaves it, still without checkpoints."""
    root = tmp_path_factory.mktemp("runs")
    for model in {save[0] for save in SAVES.values()}:
        recipe = load_recipe("sft", RECIPE, [f"model={directories[model]}", f"output_dir={root / model}"])
        (root / model).mkdir()
        (root / model / "config.yaml").write_text(to_yaml(recipe.config))
        (directories[model] / "tokenizer.json").write_text('{"a": "tokenizer"}')
    return root


LAYER = "model.layers.1."
GATE, UP, QUERY = (LAYER + name for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "self_attn.q_proj.weight"))
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
DAMAGES = {  # name: (shape of a tensor, None: not there; what the message must hold)
    "missing tensor": ({UP: None}, r"hold no 'model\.layers\.1\.mlp\.up_proj\.weight'"),
    "missing norm": ({NORM: None}, r"hold no 'model\.norm\.weight'"),
    "missing head": ({HEAD: None}, r"hold no 'lm_head\.weight'"),
    "norm too long": ({NORM: (33,)}, r"model\.norm\.weight.*\(33,\).*\(32,\)"),
    "up too wide": ({UP: (48, 34)}, "up_proj"),
    "up too long": ({UP: (50, 32)}, "up_proj"),
    "gate short, up long": ({GATE: (46, 32), UP: (50, 32)}, "gate_proj"),  # of the right size together
    "more heads": ({QUERY: (64, 32)}, "q_proj"),
    "odd query rows": ({QUERY: (33, 32)}, "q_proj"),
    "vocabulary too short": ({EMBEDDING: (20, 32)}, "embed_tokens"),
    "vocabulary too long": ({EMBEDDING: (40, 32)}, "embed_tokens"),
    "no safetensors": (None, r"holds no model\.safetensors"),
}


@pytest.fixture(scope="module")
def refused(directories, tmp_path_factory):
    """Directories whose weights cannot be loaded."""
    root = tmp_path_factory.mktemp("refused")
    whole = load_file(directories["llama"] / "model.safetensors")
    for label, (shapes, _) in DAMAGES.items():
        (root / label).mkdir()
        shutil.copy(directories["llama"] / "config.json", root / label)
        if shapes is None:
            torch.save(whole, root / label / "pytorch_model.bin")
            continue
        state = {name: tensor for name, tensor in whole.items() if name not in shapes}
        state |= {name: torch.ones(shape) for name, shape in shapes.items() if shape}
        save_file(state, root / label / "model.safetensors")
    return {label: root / label for label in DAMAGES}


@pytest.fixture(scope="module")
def launches(directories, refused, runs):
    """What `launch` returned on every rank, by number of ranks."""
    saves = [(runs / model, directories[model], *rest) for model, *rest in SAVES.values()]
    return {
        2: run_ranks(launch, 2, LAYOUTS[2], directories, refused, saves, timeout=180.0),
        4: run_ranks(launch, 4, LAYOUTS[4], directories, {}, [], timeout=180.0),
    }


@pytest.fixture(scope="module")
def exported(launches, runs):
    """(root of the exported directories by name of `SAVES`, steps, messages of refused exports)."""
    root = runs.parent / "exported"
    jobs = [(runs / model, root / name, step) for name, (model, _, step, _) in SAVES.items()]
    newest = (runs / "bf16", root / "newest", None)
    bad_jobs = [(runs, root / "a", None), (runs / "bf16", root / "newest", None), (runs / "bf16", root / "b", 7)]
    [(steps, messages)] = run_ranks(export, 1, [*jobs, newest], bad_jobs, timeout=180.0)
    return root, dict(zip([*SAVES, "newest"], steps, strict=True)), messages


@pytest.mark.parametrize("layout", [*LAYOUTS[2], *LAYOUTS[4]], ids=["DP2", "TP2", "PP2", "TP2xPP2"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(launches, models, layout, case):
    name, vocab_size, _ = CASES[case]
    size = 4 if layout in LAYOUTS[4] else 2
    # A vocabulary wider than the model: its head has no such rows, and they are read as zeros.
    expected = torch.nn.functional.pad(models[name][2], (0, max(0, vocab_size - VOCAB)))[:, :vocab_size]
    found = [logits[(*layout, case)] for logits, _ in launches[size] if logits[(*layout, case)] is not None]
    assert len(found) == size // layout[1]
    for logits in found:
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0.0)


def test_the_models_are_what_their_names_say(models):
    directory, model, logits = models["llama3-rope"]
    plain = LlamaConfig(**model.config.to_dict() | {"rope_parameters": PLAIN_ROPE | {"rope_theta": 500000.0}})
    unscaled = AutoModelForCausalLM.from_pretrained(directory, config=plain, dtype=torch.float32)
    assert (logits_by_transformers(unscaled, make_rows("llama3-rope")) - logits).abs().max() > 0.01
    assert (models["sharded"][0] / "model.safetensors.index.json").is_file()
    assert load_file(models["bf16"][0] / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("label", DAMAGES)
def test_weights_that_do_not_fit_are_refused(launches, label):
    for _, messages in launches[2]:
        assert re.match(f"ConfigError: .*{DAMAGES[label][1]}", messages[label]), messages[label]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": SLIDING}, "sliding_window=8"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ("llama", {"model_type": "mistral"}, "model_type 'mistral' is not supported; supported: llama, qwen2, qwen3"),
        ("llama", {"model_type": None}, "model_type None"),
    ],
)
def test_an_architecture_that_cannot_be_computed_is_refused(directories, tmp_path, name, changes, message):
    config = json.loads((directories[name] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    Architecture.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=message):
        Architecture.from_directory(tmp_path)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[1, 2]", "{}", '{"model_type": "llama", "hidden_size": "wide"}', "[" * 99_999]
)
def test_a_broken_config_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        Architecture.from_directory(tmp_path)


@pytest.mark.parametrize("name", SAVES)
def test_an_export_is_the_saved_model_bit_for_bit(exported, models, name):
    root, steps, _ = exported
    model, _, step, new_value = SAVES[name]
    directory, _, logits = models[model]
    expected = load_file(directory / "model.safetensors")  # the names that transformers wrote
    if new_value is not None:
        expected = {key: tensor.float() for key, tensor in expected.items()}
        expected["model.norm.weight"][3] = new_value
    found = load_file(root / name / "model.safetensors")
    assert steps[name] == step
    assert found.keys() == expected.keys()
    assert ("lm_head.weight" in found) == (not MODELS[model][1])
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key

    config = json.loads((directory / "config.json").read_text())
    kept = "float32" if new_value is not None or model != "bf16" else "bfloat16"
    assert json.loads((root / name / "config.json").read_text()) == config | {"dtype": kept}
    assert (root / name / "tokenizer.json").read_text() == '{"a": "tokenizer"}'

    read_back = AutoModelForCausalLM.from_pretrained(root / name)
    assert read_back.dtype == getattr(torch, kept)
    difference = (logits_by_transformers(read_back.float(), make_rows(model)) - logits).abs().max()
    assert (difference > 1e-3) if new_value is not None else (difference < 1e-5)


def test_an_export_takes_the_newest_checkpoint_and_refuses_the_rest(exported):
    root, steps, messages = exported
    assert steps["newest"] == 2
    newest, changed = (load_file(root / name / "model.safetensors") for name in ("newest", "bf16 changed PP2"))
    assert all(torch.equal(newest[key], tensor) for key, tensor in changed.items())
    for message, words in zip(messages, ("is no run directory", "exists already", "there are [1, 2]"), strict=True):
        assert words in message
    assert sorted(path.name for path in root.iterdir()) == sorted([*SAVES, "newest"])
