"""The sampler: `draw` by hand, completions against transformers, and the same tokens in every layout.

Launches: 2 ranks and 4 ranks. Every rank returns its completions; transformers runs in the test's own process, in fp32.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from renio_megatron.config import ParallelConfig, TrainConfig
from renio_megatron.types import Prompt, SamplingParams
from tests.helpers.multiprocess import run_ranks

TOLERANCE = 1e-5
VOCAB, LIMIT = 37, 9
STOP_IDS = (5, 11, 17, 30)
PROMPTS = ((4, 8, 15), (16,), (23, 4, 2, 10, 8, 36), (3, 1), (7, 7, 7, 7, 9, 2, 6), (1,), (4, 8, 15))
LAYOUTS = {2: ((1, 1), (2, 1), (1, 2)), 4: ((2, 2), (1, 2))}  # (tensor, pipeline); the rest is data-parallel
EVERY_LAYOUT = [(size, *layout) for size, layouts in LAYOUTS.items() for layout in layouts]
LAYOUT_IDS = ["DP2", "TP2", "PP2", "TP2xPP2", "PP2xDP2"]
MODELS = ("llama", "qwen3")

PLAIN = SamplingParams(temperature=1.0, top_p=None, top_k=None, max_completion_length=LIMIT)
USUAL = {
    "sampling_params": PLAIN,
    "temperature": 1.0,
    "stop_ids": STOP_IDS,
    "rng_stream": (1, 0),
    "seed": 3,
    "order": range(7),
}
CASES = {
    "plain": USUAL,
    "nucleus": USUAL | {"sampling_params": replace(PLAIN, temperature=0.8, top_p=0.8), "temperature": 1.3},
    "top-k": USUAL | {"sampling_params": replace(PLAIN, top_k=3), "temperature": 0.7},
    "greedy": USUAL | {"sampling_params": replace(PLAIN, temperature=0.0), "stop_ids": ()},
    "micro": USUAL | {"sampling_params": replace(PLAIN, micro_batch_size=2)},
    "reversed": USUAL | {"order": range(6, -1, -1)},
    "other stream": USUAL | {"rng_stream": (2, 0)},
    "other seed": USUAL | {"seed": 4},
    "endless": USUAL | {"stop_ids": ()},
    "long": USUAL | {"sampling_params": replace(PLAIN, max_completion_length=LIMIT + 6)},
    "one token": USUAL
    | {"sampling_params": replace(PLAIN, max_completion_length=1), "stop_ids": tuple(range(0, VOCAB, 2))},
    "other padding": USUAL | {"pad_id": 20},
}
COMPARED = ("plain", "nucleus", "greedy", "micro")  # in every layout; the others where one rank has the whole model


@pytest.fixture(scope="module")
def draw():
    from renio_megatron.megatron.student.sampler import draw  # imports Megatron, which takes seconds

    return draw


def drawn_frequencies(draw, probabilities, sampling_params, points=20000):
    """Share of evenly spread uniforms that each token is drawn for: its probability, up to 1 / points."""
    logits = torch.tensor(probabilities).log() + 1.7  # any constant may be added to logits
    uniform = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    tokens = draw(logits.expand(points, -1), uniform, sampling_params)
    return torch.bincount(tokens, minlength=len(probabilities)).double() / points


@pytest.mark.parametrize(
    ("probabilities", "options", "expected"),
    [
        ([0.1, 0.4, 0.2, 0.3], {}, [0.1, 0.4, 0.2, 0.3]),
        ([0.1, 0.4, 0.2, 0.3], {"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares, 0.3 in all
        ([0.64, 0.04, 0.32], {"temperature": 2.0}, [0.8 / 1.5656854, 0.2 / 1.5656854, 0.5656854 / 1.5656854]),
        ([0.1, 0.4, 0.2, 0.3], {"top_k": 1}, [0.0, 1.0, 0.0, 0.0]),
        ([0.1, 0.4, 0.2, 0.3], {"top_k": 2}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ([0.1, 0.4, 0.2, 0.3], {"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ([0.15, 0.5, 0.05, 0.3], {"top_p": 0.01}, [0.0, 1.0, 0.0, 0.0]),
        ([0.15, 0.5, 0.05, 0.3], {"top_p": 0.49}, [0.0, 1.0, 0.0, 0.0]),
        ([0.15, 0.5, 0.05, 0.3], {"top_p": 0.51}, [0.0, 5 / 8, 0.0, 3 / 8]),
        ([0.15, 0.5, 0.05, 0.3], {"top_p": 0.79}, [0.0, 5 / 8, 0.0, 3 / 8]),
        ([0.15, 0.5, 0.05, 0.3], {"top_p": 0.81}, [3 / 19, 10 / 19, 0.0, 6 / 19]),
        ([0.15, 0.5, 0.05, 0.3], {"top_p": 1.0}, [0.15, 0.5, 0.05, 0.3]),
        ([0.25, 0.25, 0.25, 0.25], {"top_p": 0.5}, [0.5, 0.5, 0.0, 0.0]),  # reached exactly by two
        # Of the three largest, (10, 6, 3) / 19, two hold 0.84; of all four they would hold 0.8.
        ([0.15, 0.5, 0.05, 0.3], {"top_k": 3, "top_p": 0.83}, [0.0, 5 / 8, 0.0, 3 / 8]),
        # Squared first: (4, 25, 9) / 38, so the largest alone holds 0.658; before, it holds 0.5.
        ([0.2, 0.5, 0.3], {"temperature": 0.5, "top_p": 0.6}, [0.0, 1.0, 0.0]),
    ],
)
def test_draws_follow_the_probabilities(draw, probabilities, options, expected):
    found = drawn_frequencies(draw, probabilities, replace(PLAIN, **options))
    expected = torch.tensor(expected, dtype=torch.float64)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0.0)


def test_greedy_is_the_largest_logit_whatever_else_is_set(draw):
    logits = torch.tensor([[0.0, 2.0, 1.0], [-3.0, -5.0, -4.0], [1.0, 1.5, 1.75]])
    for uniform in (0.0, 0.5, 0.999):
        sampling_params = replace(PLAIN, temperature=0.0, top_p=0.3, top_k=2)
        assert draw(logits, torch.full((3,), uniform), sampling_params).tolist() == [1, 0, 2]


def test_rows_are_drawn_independently(draw):
    logits = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.1, 0.9]]).log()
    for options in ({}, {"top_p": 1.0}):
        assert draw(logits, torch.tensor([0.7, 0.7, 0.7]), replace(PLAIN, **options)).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 1.0}, {"top_k": 2, "top_p": 0.9}, {"temperature": 3.0}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_probability_0_is_never_drawn(draw, options, dtype):
    impossible = -torch.inf
    logits = torch.tensor(
        [
            [impossible, 0.0, -1.0, impossible, 2.0, impossible],
            [-1.0e5, 3.0, impossible, 3.0, 3.0, -1.0e5],
            [impossible, impossible, 0.1, impossible, impossible, impossible],
        ]
    )
    possible = [{1, 2, 4}, {1, 3, 4}, {2}]
    largest = 1.0 - torch.finfo(dtype).eps / 2
    for value in (0.0, 1e-300, torch.finfo(dtype).eps, 0.5, 1.0 - torch.finfo(dtype).eps, largest):
        tokens = draw(logits, torch.full((3,), value, dtype=dtype), replace(PLAIN, **options)).tolist()
        assert all(token in allowed for token, allowed in zip(tokens, possible, strict=True)), (value, tokens)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 1000, 4097])
def test_sums_in_a_fixed_order_are_sums(size):
    from renio_megatron.megatron.student import sampler

    values = torch.rand(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(sampler._in_fixed_order(values), values.cumsum(-1), rtol=1e-14, atol=0)


def test_where_bits_must_repeat_on_a_gpu_torchs_scan_is_not_called(draw, monkeypatch):
    from renio_megatron.megatron.student import sampler

    logits, uniform = torch.randn(64, 500, generator=torch.Generator().manual_seed(1)), torch.rand(64)
    options = [
        SamplingParams(1.0, None, None, 1, None),
        SamplingParams(0.8, 0.9, 20, 1, None),
        SamplingParams(1.1, 0.95, None, 1, None),
    ]
    expected = [draw(logits, uniform, one) for one in options]
    monkeypatch.setattr(sampler, "_must_repeat", lambda values: True)
    monkeypatch.setattr(torch.Tensor, "cumsum", None)
    assert [draw(logits, uniform, one).tolist() for one in options] == [one.tolist() for one in expected]


def test_draw_leaves_the_logits_alone(draw):
    logits = torch.randn(3, 5)
    before = logits.clone()
    draw(logits, torch.rand(3), replace(PLAIN, temperature=0.7, top_k=2, top_p=0.5))
    assert torch.equal(logits, before)


def sample_everywhere(layouts, directories):
    """(tokens, log-probabilities, finished) of every prompt, by layout, model and case."""
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.megatron.weights.hf import load_weights
    from renio_megatron.models.architecture import Architecture

    found = {}
    for tensor, pipeline in layouts:
        parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
        layout = start(parallel, seed=0)
        for model, directory in directories.items():
            architecture = Architecture.from_directory(directory)
            part = build_model(architecture, layout, parallel, TrainConfig(), vocab_size=VOCAB)
            load_weights(part, directory)
            part.train()
            for case in COMPARED if (tensor, pipeline) != (1, 1) else CASES:
                found[tensor, pipeline, model, case] = sample(part, **CASES[case])
            assert part.chunks[0].training
    return found


def sample(part, *, sampling_params, temperature, stop_ids, rng_stream, seed, order, pad_id=0):
    """Completions in the order of `PROMPTS`, whatever order they are asked for in."""
    from renio_megatron.megatron.student.sampler import MegatronSampler

    sampler = MegatronSampler(part, seed=seed, temperature=temperature, stop_ids=stop_ids, pad_id=pad_id)
    prompts = [Prompt(100 + i, PROMPTS[i], ()) for i in order]
    rollouts = sampler.sample(prompts, sampling_params, rng_stream=rng_stream)
    assert [rollout.prompt for rollout in rollouts] == prompts
    by_index = {rollout.prompt.index - 100: rollout for rollout in rollouts}
    return [(list(r.completion_ids), r.logp, r.finished) for r in (by_index[i] for i in range(len(PROMPTS)))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(directory, transformers' model) of every name; every parameter is random."""
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    configs = (LlamaConfig(**shape), Qwen3Config(**shape, head_dim=16, tie_word_embeddings=True))
    found = {}
    for seed, (name, config) in enumerate(zip(MODELS, configs, strict=True)):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0.0, 0.2)
        directory = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(directory)
        found[name] = (directory, model)
    return found


@pytest.fixture(scope="module")
def samples(models):
    """Samples of every rank, by number of ranks."""
    directories = {name: directory for name, (directory, _) in models.items()}
    return {
        size: run_ranks(sample_everywhere, size, layouts, directories, timeout=180.0)
        for size, layouts in LAYOUTS.items()
    }


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


@pytest.fixture
def whole(samples, model):
    """One model's samples on a rank that holds all of it, by case."""
    return {case: samples[2][0][1, 1, model, case] for case in CASES}


def tokens_of(sampled):
    return [tokens for tokens, _, _ in sampled]


@pytest.mark.parametrize(("size", "tensor", "pipeline"), EVERY_LAYOUT, ids=LAYOUT_IDS)
def test_every_layout_and_rank_draws_the_same(samples, model, whole, size, tensor, pipeline):
    for rank in samples[size]:
        for case in COMPARED:
            expected, found = whole[case], rank[tensor, pipeline, model, case]
            assert tokens_of(found) == tokens_of(expected), case
            assert [finished for *_, finished in found] == [finished for *_, finished in expected]
            for (_, logp, _), (_, expected_logp, _) in zip(found, expected, strict=True):
                torch.testing.assert_close(logp, expected_logp, atol=TOLERANCE, rtol=0.0)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_log_probabilities_are_transformers_at_the_loss_temperature(models, model, whole, case):
    for prompt, (tokens, logp, _) in zip(PROMPTS, whole[case], strict=True):
        logits = models[model][1](torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / CASES[case]["temperature"]).log_softmax(-1)[range(len(tokens)), tokens]
        assert logp.dtype == torch.float32 and logp.shape == (len(tokens),)
        torch.testing.assert_close(logp, expected, atol=TOLERANCE, rtol=0.0)


@torch.no_grad()
def test_greedy_is_transformers_argmax_continuation(models, model, whole):
    for prompt, (tokens, _, finished) in zip(PROMPTS, whole["greedy"], strict=True):
        row = list(prompt)
        for _ in range(LIMIT):
            row.append(int(models[model][1](torch.tensor([row])).logits[0, -1].argmax()))
        assert tokens == row[len(prompt) :]
        assert not finished


@torch.no_grad()
def test_drawn_tokens_are_inside_the_nucleus(models, model, whole):
    """The smallest set that reaches 0.8: without the drawn token, what is more probable holds less than that."""
    for prompt, (tokens, _, _) in zip(PROMPTS, whole["nucleus"], strict=True):
        logits = models[model][1](torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        probability = (logits / 0.8).softmax(-1)
        drawn = probability[range(len(tokens)), tokens]
        assert bool((torch.where(probability > drawn[:, None], probability, 0.0).sum(-1) < 0.8).all())


def test_stop_ids_end_a_row_and_the_limit_cuts_it(whole):
    ends = set()
    for tokens, _, finished in whole["plain"]:
        assert not set(tokens[:-1]) & set(STOP_IDS)
        assert finished == (tokens[-1] in STOP_IDS)
        assert len(tokens) == LIMIT or finished
        ends.add(finished)
    assert ends == {True, False}
    assert all(len(tokens) == LIMIT and not finished for tokens, _, finished in whole["endless"])
    # The stop token may also be the last one that fits.
    assert {finished for *_, finished in whole["one token"]} == {True, False}
    assert all(finished == (token % 2 == 0) for (token,), _, finished in whole["one token"])


@pytest.mark.parametrize("case", ["micro", "reversed", "other padding"])
def test_a_row_does_not_depend_on_the_others(whole, case):
    assert tokens_of(whole[case]) == tokens_of(whole["plain"])


@pytest.mark.parametrize("case", ["other stream", "other seed"])
def test_another_stream_or_seed_draws_other_completions(whole, case):
    pairs = zip(tokens_of(whole[case]), tokens_of(whole["plain"]), strict=True)
    assert sum(a != b for a, b in pairs) >= len(PROMPTS) - 1


def test_equal_prompts_are_continued_each_in_its_own_way(whole):
    assert PROMPTS[0] == PROMPTS[6]
    assert tokens_of(whole["endless"])[0] != tokens_of(whole["endless"])[6]


def test_a_longer_limit_keeps_the_earlier_tokens(whole):
    longer = 0
    for short, long in zip(tokens_of(whole["plain"]), tokens_of(whole["long"]), strict=True):
        assert long[: len(short)] == short
        longer += len(long) > len(short)
    assert longer > 0
