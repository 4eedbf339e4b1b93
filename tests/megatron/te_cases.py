"""What the ranks of test_te_spec.py do: models of Transformer Engine's modules (a stand-in), and local ones."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace

import torch

from renio_megatron.config import ParallelConfig, PrecisionConfig, TeacherPrecisionConfig, TrainConfig
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.types import Prompt, Rollout, SamplingParams
from tests.fakes import te_standin
from tests.helpers.training_cases import layout_of, one_step, recipe

FAMILIES = ("qwen3", "qwen2")
LAYOUTS = {  # name: settings; the rest of two ranks is data-parallel
    "DP2": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
}
VOCAB = 41
LENGTHS = ((3, 5), (7, 1), (2, 9), (1, 4), (4, 4), (6, 2), (1, 1), (5, 7))  # prompt, completion
FP8 = PrecisionConfig(backend="te", fp8="hybrid")
TE = PrecisionConfig(backend="te")
LOCAL = PrecisionConfig(backend="local")
MIXED = replace(FP8, first_last_layers_bf16=True, num_layers_at_end_in_bf16=2)
GREEDY = SamplingParams(0.0, None, None, 5, None)


def save_models(root):
    """A directory for each family, every parameter random, norms and biases included; shapes that FP8 takes."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

    shape = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 3e-3}
    configs = {"qwen3": Qwen3Config(**shape, head_dim=16), "qwen2": Qwen2Config(**shape, tie_word_embeddings=True)}
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                is_norm = "norm" in parameter_name
                parameter.uniform_(0.5, 1.5) if is_norm else parameter.normal_(0.0, 0.1)
        model.save_pretrained(root / name)


def rollouts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    made = []
    for number, (prompt, completion) in enumerate(lengths):
        tokens = torch.randint(VOCAB, (prompt + completion,), generator=generator).tolist()
        made.append(Rollout(Prompt(number, tuple(tokens[:prompt]), tuple(tokens[:prompt])), tuple(tokens[prompt:])))
    return made


def build(directory, layout, parallel, precision, train=None, *, trained=True):
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.weights.hf import load_weights
    from renio_megatron.models.architecture import Architecture

    architecture = Architecture.from_directory(directory)
    train = train or TrainConfig(micro_batch_size=2)
    part = build_model(architecture, layout, parallel, train, precision, vocab_size=VOCAB, trained=trained)
    load_weights(part, directory)
    return part


def step_of(part, train, parallel, precision=None, steps=1):
    """(metrics of the last step, gradients of this rank's parameters) of fine-tuning on this rank's share of the
    batch."""
    from renio_megatron.megatron.student.learner import MegatronLearner
    from renio_megatron.training.algorithms.sft import token_cross_entropy

    learner = MegatronLearner(part, train, parallel, temperature=1.0, pad_id=0)
    data, seen = part.layout.data, {}
    step = learner.optimizer.step

    def look_and_step():
        seen.update({name: parameter.main_grad.clone() for name, parameter in part.named_parameters()})
        return step()

    learner.optimizer.step = look_and_step
    batch = learner.make_micro_batches(rollouts()[data.rank :: data.size])
    found = [learner.update(batch, token_cross_entropy, step=step, lr=1e-2) for step in range(1, steps + 1)]
    return found[-1], seen


def logp_of(part, train):
    """log p of every completion token of the whole batch, fp32 [N], on every rank of the model."""
    from renio_megatron.config import HeadConfig
    from renio_megatron.data.batching.collate import collate
    from renio_megatron.losses.token_logp import linear_token_logp
    from renio_megatron.megatron.model.schedules import broadcast_token_values, run_forward

    batch_layout = part.batch_layout(0, train.micro_batch_size, train.max_tokens_per_micro_batch)
    batches = collate(rollouts(), audience="student", batch_layout=batch_layout)

    def rows_logp(index, batch, rows):
        return linear_token_logp(rows, part.head(), batch.target_ids, HeadConfig(), 1.0)

    part.train(False)
    return broadcast_token_values(run_forward(part, batches, rows_logp), batches, part.layout)


def sample_of(part, count=3, pad_id=0):
    from renio_megatron.megatron.student.sampler import MegatronSampler

    prompts = [rollout.prompt for rollout in rollouts()[:count]]
    sampler = MegatronSampler(part, seed=1, temperature=1.0, stop_ids=[VOCAB - 1], pad_id=pad_id)
    found = sampler.sample(prompts, GREEDY, rng_stream=(1,))
    return [(rollout.completion_ids, rollout.logp) for rollout in found]


def start_everything(parallel):
    from renio_megatron.megatron.runtime.initialize import start

    layout = start(parallel, seed=0)
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    TEDotProductAttention.cp_stream = object()  # a CUDA stream otherwise
    return layout


def reference(root, family):
    """Gradients by Hugging Face name, log-probabilities, samples and parameters' names of the local spec on one rank of
    the model."""
    from renio_megatron.megatron.weights.hf import to_hf
    from renio_megatron.models.param_map import hf_names

    parallel, train = ParallelConfig(), TrainConfig(micro_batch_size=2)
    layout = start_everything(parallel)
    part = build(root / family, layout, parallel, LOCAL)
    logp, sample = logp_of(part, train), sample_of(part)
    _, gradients = step_of(part, train, parallel)
    by_hf_name = {}
    for name, gradient in gradients.items():
        gradient = gradient[:VOCAB] if "embedding" in name or "output_layer" in name else gradient
        parts = to_hf(name, gradient, part.architecture)
        by_hf_name.update(zip(hf_names(name, part.architecture), parts, strict=True))
    return by_hf_name, logp, sample, set(gradients)


def gradient_difference(part, gradients, by_hf_name):
    """Largest absolute difference of this rank's gradients from its shards of the reference's."""
    from renio_megatron.models.param_map import hf_names
    from tests.helpers.whole_tensors import take_shard, to_megatron

    worst, tensor = 0.0, part.layout.tensor
    for name, parameter in part.named_parameters():
        parts = [by_hf_name[hf_name] for hf_name in hf_names(name, part.architecture)]
        whole = to_megatron(name, parts, part.architecture)
        expected = take_shard(name, whole, parameter, tensor.rank, tensor.size)
        assert expected.abs().max() > 1e-4, name
        worst = max(worst, float((gradients[name] - expected).abs().max()))
    return worst


def same_as_local(root):
    """By family, layout and arrangement: how far gradients, log-probabilities and samples are from the local spec's."""
    te_standin.install()
    from renio_megatron.models.param_map import local_name

    found = {}
    for family in FAMILIES:
        by_hf_name, logp, sample, names = reference(root, family)
        for name, sizes in LAYOUTS.items():
            parallel = ParallelConfig(**sizes)
            layout = start_everything(parallel)
            for limit, padded in ((None, False), (24, False), (24, True)):
                if padded and name not in ("TP2 SP", "CP2"):
                    continue
                train = TrainConfig(micro_batch_size=2, max_tokens_per_micro_batch=limit)
                part = build(root / family, layout, parallel, TE, train)
                if padded:
                    part.fp8_multiple = 16  # all that FP8 does to shapes, and nothing that it does to numbers
                mine = sample_of(part)
                found[family, name, limit, padded] = {
                    "strange names": {
                        local_name(name) for name, _ in part.named_parameters() if name.startswith("decoder.")
                    }
                    - names,
                    "kinds": sorted({type(m).__name__ for m in part.chunks[0].modules()} & EXPECTED_KINDS),
                    "logp": float((logp_of(part, train) - logp).abs().max()),
                    "tokens": [ids for ids, _ in mine] == [ids for ids, _ in sample],
                    "sampled logp": max(
                        float((a - b).abs().max()) for (_, a), (_, b) in zip(mine, sample, strict=True)
                    ),
                    "gradient": gradient_difference(part, step_of(part, train, parallel)[1], by_hf_name),
                }
    return found


EXPECTED_KINDS = {
    "TELayerNormColumnParallelLinear",
    "TERowParallelLinear",
    "TEDotProductAttention",
    "RMSNorm",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "SdpaCoreAttention",
}


def distil(root):
    """A whole distillation step against transformers and autograd: by case, what `one_step` returns."""
    te_standin.install()
    found = {}
    for name, tp, sp in (("DP2", 1, False), ("TP2 SP", 2, True)):
        config: DistillationConfig = recipe(
            root,
            parallel=layout_of(tp, sp=sp),
            precision=TE,
            teacher_precision=TeacherPrecisionConfig(backend="te"),
        )
        found[name] = one_step(config, root / name)
    return found


def exported(root):
    """By family: whether an export of a model as it was read, and of one that went through checkpoints of the other
    backend, gives back the tensors of the directory bit for bit."""
    from safetensors.torch import load_file

    te_standin.install()
    found = {}
    for family in FAMILIES:
        written = load_file(root / family / "model.safetensors")
        for name, sizes in (("DP2", {}), ("TP2", LAYOUTS["TP2"])):
            parallel = ParallelConfig(**sizes)
            layout = start_everything(parallel)
            for source, target in ((TE, LOCAL), (LOCAL, TE), (TE, TE)):
                folder = root / f"{family}-{name}-{source.backend}-{target.backend}"
                part = build(root / family, layout, parallel, source)
                save(part, folder, parallel)
                found[family, name, source.backend, target.backend] = (folder, part.backend)
        parallel = ParallelConfig()
        layout = start_everything(parallel)
        found[family, "as read"] = same(written, build(root / family, layout, parallel, TE))
        for key, value in list(found.items()):
            if key[0] == family and isinstance(value, tuple):
                found[key] = same(written, reload(value[0], root / family, layout, key[-1]))
    return found


def save(part, folder, parallel):
    from renio_megatron.megatron.checkpoint.checkpointer import MegatronCheckpointer
    from renio_megatron.megatron.student.learner import MegatronLearner

    learner = MegatronLearner(part, TrainConfig(), parallel, temperature=1.0, pad_id=0)
    MegatronCheckpointer(folder, learner).save(1, {})


def reload(folder, directory, layout, backend):
    from renio_megatron.megatron.checkpoint.directory import step_directory
    from renio_megatron.megatron.checkpoint.saved_model import load_model_weights
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.models.architecture import Architecture

    architecture = Architecture.from_directory(directory)
    precision = PrecisionConfig(backend=backend)
    part = build_model(architecture, layout, ParallelConfig(), TrainConfig(seed=8), precision, vocab_size=VOCAB)
    load_model_weights(step_directory(folder, 1), part)
    return part


def same(written, part):
    from renio_megatron.megatron.weights.hf import hf_state

    state = dict(hf_state(part))
    return state.keys() == written.keys() and all(torch.equal(state[key], written[key]) for key in written)


def in_fp8_by_layout(root):
    """By layout, arrangement and recipe: how far log-probabilities are from exact ones, and the cosine of gradients."""
    te_standin.install()
    found = {}
    for name in ("DP2", "TP2", "TP2 SP", "CP2", "PP2"):
        parallel = ParallelConfig(**LAYOUTS[name])
        layout = start_everything(parallel)
        for limit in (None, 24):
            train = TrainConfig(micro_batch_size=2, max_tokens_per_micro_batch=limit)
            for recipe_name in ("tensorwise", "mxfp8"):
                part = build(root / "qwen3", layout, parallel, replace(FP8, fp8_recipe=recipe_name), train)
                exact = build(root / "qwen3", layout, parallel, TE, train)
                difference = float((logp_of(part, train) - logp_of(exact, train)).abs().mean())
                _, gradients = step_of(part, train, parallel)
                _, right = step_of(exact, train, parallel)
                cosine = min(cosine_of(gradients[key], right[key]) for key in gradients)
                found[name, limit, recipe_name] = difference, cosine
    return found


def in_fp8(root):
    """What FP8 does and leaves alone; see the tests."""
    te_standin.install()
    found, parallel = {}, ParallelConfig()
    layout = start_everything(parallel)
    make = functools.partial(build, root / "qwen3", layout, parallel)
    train = TrainConfig(micro_batch_size=2)
    found["layers"] = [flags_of(part, train) for part in (make(FP8), make(MIXED), make(TE))]
    teacher = make(replace(MIXED, fp8_recipe="blockwise"), trained=False)
    found["teacher"] = flags_of(teacher, train), kept_in_fp8(teacher), rounding_of(teacher, make(TE))
    found["teacher's initial values"] = initial_values_are_loaded(teacher, make(TE))[0]
    found["student's weights"] = kept_in_fp8(make(FP8))
    gathered = make(replace(FP8, fp8_param_gather=True))
    found["gathered"] = kept_in_fp8(gathered), initial_values_are_loaded(gathered, make(TE))
    found["stale"] = sampled_after_a_change(make(FP8), make)
    found["unpadded"] = refused_without_padding(make(FP8), train)
    found["rows"] = decoded_rows(make(FP8))
    recomputing = replace(train, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    whole, again = (step_of(make(FP8, one), one, parallel)[1] for one in (train, recomputing))
    found["recomputed"] = max(float((whole[key] - again[key]).abs().max()) for key in whole)
    return found


def cosine_of(a, b):
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def flags_of(part, train):
    """Whether each product of one micro-batch was in FP8, in order; four a layer."""
    te_standin.PRODUCTS.clear()
    logp_of(part, train)
    return [is_fp8 for _, _, is_fp8 in te_standin.PRODUCTS[:16]]


def kept_in_fp8(part):
    """Numbers of the layers whose four weights are kept in FP8; -1 stands for any other parameter."""
    names = [name for name, parameter in part.named_parameters() if isinstance(parameter, te_standin.QuantizedTensor)]
    numbers = [int(name.split(".")[2]) if name.endswith(".weight") and "linear" in name else -1 for name in names]
    return [number for number in sorted(set(numbers)) if numbers.count(number) == 4 or number == -1]


def rounding_of(quantized, exact):
    """Largest difference, over the exported tensors, of FP8 weights from the rounded values of the exact ones."""
    by_name = dict(exact.named_parameters())
    from renio_megatron.megatron.model.te_modules import values_of

    worst = 0.0
    for name, parameter in quantized.named_parameters():
        expected = by_name[name].detach()
        if isinstance(parameter, te_standin.QuantizedTensor):
            assert not torch.equal(values_of(parameter), expected)
            expected = te_standin.rounded(expected)
        assert type(values_of(parameter)) is torch.Tensor
        worst = max(worst, float((values_of(parameter) - expected).abs().max()))
    return worst


def initial_values_are_loaded(part, exact):
    by_name = dict(exact.named_parameters())
    kept = [
        (n, p._high_precision_init_val) for n, p in part.named_parameters() if hasattr(p, "_high_precision_init_val")
    ]
    return len(kept), all(torch.equal(values, by_name[name]) for name, values in kept)


def sampled_after_a_change(part, make):
    """Whether a model samples with its present weights after a pass with earlier ones."""
    sample_of(part)
    changed = make(FP8)
    with torch.no_grad():
        for one in (part, changed):
            for name, parameter in one.named_parameters():
                if "linear_fc1.weight" in name:
                    parameter.mul_(-1.0)
    return same_samples(sample_of(part), sample_of(changed))


def same_samples(one, other):
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


def refused_without_padding(part, train):
    """Messages of the products' refusals where nothing is padded, in a pass and in decoding."""
    part.fp8_multiple, messages = 1, []
    for use in (lambda: logp_of(part, train), lambda: sample_of(part)):
        with contextlib.suppress(ValueError):
            use()
            messages.append("accepted")
            continue
        messages.append("refused")
    return messages


def decoded_rows(part):
    """Rows of the products of decoding one token of each of three sequences."""
    te_standin.PRODUCTS.clear()
    sample_of(part)
    return sorted({rows for _, rows, _ in te_standin.PRODUCTS[-16:]})
