"""Kernel tuning before a run's first step, so that no step pays for it.

On CUDA a kernel is compiled and timed under each launch configuration at its first large call of each kind
(`kernels.tuning`). Here such calls are made beforehand, on random logits and through the functions that a step calls,
so that both need the same kernels. Nothing happens where nothing would be timed: on the CPU, under
`torch.use_deterministic_algorithms`, with `RENIO_KERNELS=torch`, and for calls that the run's micro-batches are too
short for. No collectives; the state of the random number generators is unchanged.

A trial has no more entries than the calls that a step would time, and takes up to about 1 GB of the device's memory for
the moment.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import torch

from renio_megatron.config import HeadConfig, LossConfig
from renio_megatron.losses import kernels
from renio_megatron.losses.chunked_logits import logits_dtype_of
from renio_megatron.losses.token_logp import cross_entropy, token_logp
from renio_megatron.losses.vocab_passes import VocabParallelPasses
from renio_megatron.parallel.vocab import VocabShard

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def tuning_reported(device: torch.device, report: Callable[[str], None] | None = None) -> Iterator[None]:
    """A context after which torch's cached memory is freed, and the number of tuned kernels and the seconds are passed
    to `report`, or logged; nothing where nothing was tuned."""
    if not kernels.tunes(device):
        yield
        return
    from renio_megatron.losses.kernels import tuning

    before, start = tuning.num_tuned(), time.perf_counter()
    yield
    tuning.give_back_memory()
    count, seconds = tuning.num_tuned() - before, time.perf_counter() - start
    if count:
        cuts = count * len(tuning.CANDIDATES)
        (report or _log.info)(f"tuned {count} kernels in {seconds:.1f} s, {cuts} cuts compiled and timed")


def tune_loss(
    shard: VocabShard,
    loss: LossConfig,
    head: HeadConfig,
    *,
    hidden_dtype: torch.dtype,
    hidden_size: int,
    num_tokens: int,
    device: torch.device,
) -> None:
    """Tunes the kernels of `linear_distillation_loss`, forward and backward.

    Args:
        shard: the student's columns on this rank; its group is not used.
        loss, head: the run's settings.
        hidden_dtype, hidden_size: of the student's final hidden states, [N, H].
        num_tokens: the most completion tokens that a micro-batch can have on this rank.
        device: where this rank computes.
    """
    if not kernels.tunes(device):
        return
    logits_dtype = logits_dtype_of(head, hidden_dtype)
    rows = _trial_rows(shard.width, shard.num_valid, min(num_tokens, head.chunk_size or num_tokens))
    if rows:
        passes, token_ids = VocabParallelPasses(loss, _alone(shard)), _token_ids(rows, device)
        student, teacher = (_random(rows, shard.width, logits_dtype, device, seed=seed) for seed in (0, 1))
        # As in the loss: the gradient takes the logits' place, or has a narrower one of its own.
        out = student if logits_dtype == hidden_dtype else torch.empty_like(student, dtype=hidden_dtype)
        normalizers = passes.normalizers(student, teacher, token_ids)
        # No scale may be 0: the kernel passes over such rows.
        passes.totals_and_gradient(student, teacher, normalizers, torch.ones_like(normalizers.cross), out)
        del student, teacher, out
    rows = _trial_rows(hidden_size, hidden_size, num_tokens)
    if rows:  # not by 1, which costs no pass
        kernels.scale_rows_(_random(rows, hidden_size, hidden_dtype, device), torch.tensor(0.5, device=device))


def tune_scores(
    shard: VocabShard,
    head: HeadConfig,
    temperature: float,
    *,
    hidden_dtype: torch.dtype,
    num_tokens: int,
    device: torch.device,
) -> None:
    """Tunes the kernels of `linear_token_logp`, for the student or for a teacher whose columns on this rank are
    `shard`; the other arguments as in `tune_loss`."""
    if not kernels.tunes(device):
        return
    rows = _trial_rows(shard.width, shard.num_valid, min(num_tokens, head.chunk_size or num_tokens))
    if rows:
        logits = _random(rows, shard.width, logits_dtype_of(head, hidden_dtype), device)
        token_logp(logits, _token_ids(rows, device), _alone(shard), temperature=temperature)


def tune_cross_entropy(shard: VocabShard, *, hidden_dtype: torch.dtype, num_tokens: int, device: torch.device) -> None:
    """Tunes the kernels of `cross_entropy`, forward and backward; arguments as in `tune_loss`."""
    if not kernels.tunes(device):
        return
    rows = _trial_rows(shard.width, shard.num_valid, num_tokens)
    if rows:
        logits = _random(rows, shard.width, hidden_dtype, device).requires_grad_()
        with torch.enable_grad():
            total = cross_entropy(logits, _token_ids(rows, device), _alone(shard), overwrite_logits=True)
            (0.5 * total).backward()  # not by 1, which costs no pass


def _alone(shard: VocabShard) -> VocabShard:
    """A whole vocabulary with as many columns and as much padding: no other rank takes part."""
    return VocabShard(0, shard.width, shard.num_valid)


def _trial_rows(width: int, num_valid: int, most_rows: int) -> int:
    """Rows of `width` columns, of which `num_valid` are read, that are enough to be timed; 0 where calls of up to
    `most_rows` never are."""
    from renio_megatron.losses.kernels.tuning import TRIAL_ENTRIES

    is_timed = num_valid > 0 and most_rows * width >= TRIAL_ENTRIES
    return -(-TRIAL_ENTRIES // num_valid) if is_timed else 0


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers [rows, columns], from a separate generator."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(rows, columns, dtype=dtype, device=device).normal_(generator=generator)


def _token_ids(rows: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.int64, device=device)
