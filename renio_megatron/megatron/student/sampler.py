"""Sampler of completions from the current student: Megatron's model with a key-value cache, in every layout.

Rows are decoded from the shortest prompt on: where a row's prompt is longer, its own tokens are fed instead of drawn
ones, so there is no padding before a completion. Uniform random numbers are a function of (seed, stream, prompt,
position), and every tensor rank draws from the same gathered logits, so all layouts draw the same completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext

from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.megatron.model.schedules import broadcast_from_last_stage
from renio_megatron.parallel.collectives import gather_objects
from renio_megatron.parallel.stopping import StopPoints, StopRequest, give_up_together
from renio_megatron.parallel.vocab import gather_columns
from renio_megatron.types import Prompt, Rollout, SamplingParams


class MegatronSampler:
    """Draws completions of the student's view of prompts."""

    def __init__(
        self,
        part: ModelPart,
        *,
        seed: int,
        temperature: float,
        stop_ids: Sequence[int],
        pad_id: int,
        ends_in_text: Callable[[Sequence[int]], bool] | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        """Samples from `part` as it is at each call.

        Args:
            part: the student.
            seed: seed of the draws.
            temperature: the loss temperature, used for the returned log-probabilities, not for sampling.
            stop_ids: tokens that end a completion.
            pad_id: fed to rows that have ended; no effect on the others.
            ends_in_text: whether a completion's tokens end it by their text (stop strings); None: none do.
            stop: a request upon which draws are given up; None: they never are.
        """
        self._part = part
        self._seed = seed
        self._temperature = temperature
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=part.layout.device)
        self._pad_id = pad_id
        self._ends_in_text = ends_in_text
        self._stop = stop

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams,
        *,
        rng_stream: tuple[int, ...],
        on_group: Callable[[Sequence[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        """One completion of each prompt, in order.

        Args:
            prompts: this rank's prompts.
            sampling_params: how to draw.
            rng_stream: non-negative integers, for example (step,); another stream draws other completions.
            on_group: called with every group of completions that were drawn together, before the next group starts;
                once with all of them where other ranks take part in a group's drawing, which must not be delayed.
                Groups that are given up are empty.

        Raises:
            Abandoned: on every rank, where any has given up its draws because the run is to stop.
        """
        context, experts = self._part.layout.context, self._part.layout.expert_tensor_and_model
        is_shared = context.size > 1 or (self._part.architecture.experts is not None and experts.size > 1)
        # Prompts of similar length decode together: less forced feeding of prompt tokens. Ranks that share the
        # sequences decode different ones, because a completion's draws do not depend on the rank.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].student_ids))
        mine = order[context.rank :: context.size]
        size = sampling_params.micro_batch_size or len(mine)
        rollouts: dict[int, Rollout] = {}
        is_given_up = False
        with self._part.decoding():
            for start in range(0, len(mine), max(size, 1)):
                chosen = mine[start : start + size]
                decoded = None
                if not is_given_up:
                    decoded = self._decode([prompts[i] for i in chosen], sampling_params, rng_stream)
                is_given_up = decoded is None
                rollouts.update(zip(chosen, decoded or [], strict=not is_given_up))
                if on_group is not None and not is_shared:  # all ranks call it equally often
                    on_group(decoded or [])
            self._accompany()
        if self._stop is not None:
            give_up_together(self._part.layout, is_given_up)
        if context.size > 1:
            rollouts = {i: one for part in gather_objects(rollouts, context.group) for i, one in part.items()}
        drawn = [rollouts[i] for i in range(len(prompts))]
        if on_group is not None and is_shared:
            on_group(drawn)
        return drawn

    def _any_unfinished(self, is_unfinished: bool) -> bool:
        """Whether a rank that shares experts with this one makes another pass; every rank calls it before each pass."""
        experts = self._part.layout.expert_tensor_and_model
        if self._part.architecture.experts is None or experts.size == 1:
            return is_unfinished
        flag = torch.tensor(float(is_unfinished), device=self._part.layout.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=experts.group)
        return bool(flag)

    @torch.no_grad()
    def _accompany(self) -> None:
        """Runs passes over a dummy token while other ranks decode: their tokens go through this rank's experts."""
        nothing = torch.full((1, 1), self._pad_id, dtype=torch.int64, device=self._part.layout.device)
        while self._any_unfinished(False):
            self._forward(nothing, 0, StaticInferenceContext(1, 2))

    @torch.no_grad()
    def _decode(
        self, prompts: list[Prompt], sampling_params: SamplingParams, rng_stream: tuple[int, ...]
    ) -> list[Rollout] | None:
        """Completions of prompts that share a cache; None where they are given up."""
        part, device = self._part, self._part.layout.device
        count, limit = len(prompts), sampling_params.max_completion_length
        lengths = torch.tensor([len(prompt.student_ids) for prompt in prompts], device=device)
        total = int(lengths.max()) + limit
        tokens = torch.full((count, total), self._pad_id, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt.student_ids)] = torch.tensor(prompt.student_ids, device=device)
        uniform = torch.from_numpy(self._uniform(prompts, limit, rng_stream)).to(device)
        logp = torch.zeros(count, total, dtype=torch.float32, device=device)
        ended = torch.zeros(count, dtype=torch.bool, device=device)
        in_text = torch.zeros(count, dtype=torch.bool, device=device)
        ends = lengths + limit
        cache = StaticInferenceContext(count, total)

        points = StopPoints(self._stop, part.layout)
        fed, known = 0, int(lengths.min())
        while known < total and not bool(ended.all()):
            if points.reached():
                return None
            self._any_unfinished(True)
            hidden = self._forward(tokens[:, fed:known], fed, cache)
            drawn = torch.zeros(count, dtype=torch.int64, device=device)
            if hidden is not None:
                logits = gather_columns(part.head_logits(hidden), part.shard).float()
                position = (known - lengths).clamp(min=0, max=limit - 1)
                drawn = draw(logits, uniform.gather(1, position[:, None])[:, 0], sampling_params)
                logp[:, known] = (logits / self._temperature).log_softmax(-1).gather(1, drawn[:, None])[:, 0]
            drawn = broadcast_from_last_stage(drawn, part.layout)
            active = (known >= lengths) & ~ended
            tokens[:, known] = torch.where(active, drawn, tokens[:, known])
            stopped = active & torch.isin(drawn, self._stop_ids)
            if self._ends_in_text is not None:
                in_text |= self._ended_by_text(tokens[:, : known + 1], lengths, active & ~stopped)
                stopped |= active & in_text
            ends = torch.where(stopped, known + 1, ends)
            ended |= stopped | (known + 1 >= ends)
            fed, known = known, known + 1
        logp = broadcast_from_last_stage(logp, part.layout).cpu()
        return self._rollouts(prompts, tokens.cpu(), logp, ends.cpu(), in_text.tolist())

    def _ended_by_text(self, tokens: torch.Tensor, lengths: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Which of the `asked` rows end by the text of their completions, bool [b]."""
        assert self._ends_in_text is not None
        said = torch.zeros_like(asked)
        for row in asked.nonzero()[:, 0].tolist():
            said[row] = self._ends_in_text(tokens[row, int(lengths[row]) :].tolist())
        return said

    def _rollouts(
        self, prompts: list[Prompt], tokens: torch.Tensor, logp: torch.Tensor, ends: torch.Tensor, in_text: list[bool]
    ) -> list[Rollout]:
        stops = set(self._stop_ids.tolist())
        rollouts = []
        for row, prompt in enumerate(prompts):
            piece = slice(len(prompt.student_ids), int(ends[row]))
            ids = tuple(tokens[row, piece].tolist())
            finished = in_text[row] or ids[-1] in stops
            rollouts.append(Rollout(prompt, ids, logp[row, piece].clone(), finished, ended_by_string=in_text[row]))
        return rollouts

    def _forward(self, token_ids: torch.Tensor, start: int, cache: StaticInferenceContext) -> torch.Tensor | None:
        """One pass over all stages; the last position's hidden states [b, H] on the last stage, elsewhere None."""
        part, pipeline = self._part, self._part.layout.pipeline
        rows, length = token_ids.shape
        if start:
            cache.enable_decode_mode()
        positions = torch.arange(start, start + length, device=token_ids.device).expand(rows, -1)
        output = token_ids.new_zeros(0)
        for chunk in part.chunks:
            if not chunk.pre_process:
                before = pipeline.ranks[pipeline.rank - 1]  # a later chunk of the first rank follows the last rank's
                received = torch.empty(
                    length, rows, part.config.hidden_size, dtype=part.config.params_dtype, device=token_ids.device
                )
                dist.recv(received, before)
                chunk.set_input_tensor(received)
            cache.sequence_len_offset = start
            output = chunk(token_ids, positions, None, inference_context=cache, runtime_gather_output=True)
            if not chunk.post_process:
                dist.send(output.contiguous(), pipeline.ranks[(pipeline.rank + 1) % pipeline.size])
        cache.sequence_len_offset = start + length
        return output[:, -1] if part.chunks[-1].post_process else None

    def _uniform(self, prompts: list[Prompt], count: int, rng_stream: tuple[int, ...]) -> np.ndarray:
        """Uniform numbers in [0, 1), fp64 [prompts, count]; the first n of a row do not depend on `count`."""
        rows = []
        for prompt in prompts:
            entropy = np.random.SeedSequence([self._seed, *rng_stream, prompt.index])
            rows.append(np.random.Generator(np.random.Philox(entropy)).random(count))
        return np.stack(rows)


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling_params: SamplingParams) -> torch.Tensor:
    """A token of each row by inverting the cumulative distribution.

    Args:
        logits: fp32 [b, V].
        uniform: [b] in [0, 1).
        sampling_params: temperature (0: the largest logit), then top-k, then top-p.

    Returns:
        int64 [b].
    """
    if sampling_params.temperature == 0:
        return logits.argmax(-1)
    probability = (logits.double() / sampling_params.temperature).softmax(-1)
    if sampling_params.top_k is None and sampling_params.top_p is None:
        return _invert(probability, uniform)
    probability, order = probability.sort(dim=-1, descending=True, stable=True)
    if sampling_params.top_k is not None:
        probability[:, sampling_params.top_k :] = 0.0
    if sampling_params.top_p is not None:
        probability /= probability.sum(-1, keepdim=True)
        before = cumulative(probability) - probability
        probability = torch.where(before < sampling_params.top_p, probability, 0.0)
    return order.gather(1, _invert(probability, uniform)[:, None])[:, 0]


def _invert(probability: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index whose cumulative interval holds uniform x total; never one of probability 0."""
    sums = cumulative(probability)
    target = uniform.to(sums)[:, None] * sums[:, -1:]
    index = torch.searchsorted(sums, target, right=True)[:, 0]
    last = probability.shape[-1] - 1 - (probability.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index, last)


def cumulative(values: torch.Tensor) -> torch.Tensor:
    """Sums of each row up to each column [b, V].

    torch's scan on a GPU adds floats in an unspecified order, and raises under
    `torch.use_deterministic_algorithms`: there the sums are computed by recursive doubling.
    """
    return _in_fixed_order(values) if _must_repeat(values) else values.cumsum(-1)


def _must_repeat(values: torch.Tensor) -> bool:
    return values.is_cuda and torch.are_deterministic_algorithms_enabled()


def _in_fixed_order(values: torch.Tensor) -> torch.Tensor:
    sums, reach = values, 1
    while reach < values.shape[-1]:
        sums = torch.cat((sums[:, :reach], sums[:, reach:] + sums[:, :-reach]), dim=-1)
        reach *= 2
    return sums
