"""Conversion between Hugging Face directories and Megatron's shards, for all of `FAMILIES`.

A rank reads the slices that make up its parameters (`hf_slices`) and writes each to its place, without whole tensors in
between. Export splits the tensors of a model that is whole on one rank.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch

from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.megatron.model.lora import is_adapter
from renio_megatron.megatron.model.te_modules import fill, is_quantized, values_of
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.hf_weights import WeightFiles, hf_shapes
from renio_megatron.models.param_map import VOCABULARY, Slice, hf_names, is_expert, is_gate_and_up, is_qkv, slices_of

NUM_THREADS = 4
"""Files that a rank reads at once. A thread blocks in the copy, where the bytes are read from the disk."""

CHUNK_BYTES = 64 * 2**20
"""Bytes of one copy. A copy of columns to a GPU, or to another dtype, takes a second buffer in host memory."""

LINE_INTERVAL_S = 2.0


def load_weights(
    part: ModelPart,
    directory: Path,
    *,
    title: str = "model",
    report: Callable[[str], None] | None = None,
    change: Callable[[Slice, torch.Tensor], torch.Tensor] | None = None,
) -> int:
    """Fills this rank's parameters from a Hugging Face directory; adapters are not changed.

    In addition to the parameters it holds at most `NUM_THREADS` chunks of `CHUNK_BYTES`, and of FP8 parameters, which
    can only be filled all at once, one local tensor, or two where its parts are in two files.

    Args:
        part: the parameters, whatever they hold.
        directory: with config.json of the same architecture.
        title: title of the progress line.
        report: receives the progress line, every `LINE_INTERVAL_S` seconds and at the end; not called for shorter
            loads.
        change: (slice, its values) -> the values that are loaded instead; called by several threads.

    Returns:
        Bytes that were read.

    Raises:
        ConfigError: no safetensors, a tensor missing, surplus, or of another shape.
    """
    files = WeightFiles(directory)
    files.check(part.architecture)
    targets = list(_targets(part))
    jobs: dict[str, list[_Job]] = defaultdict(list)
    for target in targets:
        in_file: dict[str, list[Slice]] = defaultdict(list)
        for one in target.slices:
            in_file[files.file_of(one.tensor)].append(one)
        for file, slices in in_file.items():
            jobs[file].append((target, slices))
    num_bytes = sum(files.size_of(one) for target in targets for one in target.slices)
    line = _Line(title, files, len(jobs), num_bytes, report)
    read = functools.partial(_read_file, files, line, change or _as_they_are)
    with torch.no_grad():
        if any(target.is_quantized for target in targets):  # one at a time, and by the thread that chose the device
            for file in sorted(jobs):
                read(file, jobs[file])
        else:
            with ThreadPoolExecutor(min(NUM_THREADS, max(1, len(jobs)))) as pool:
                for _ in pool.map(read, sorted(jobs), [jobs[file] for file in sorted(jobs)]):
                    pass
    line.end()
    return files.bytes_read


def to_hf(name: str, tensor: torch.Tensor, architecture: Architecture) -> list[torch.Tensor]:
    """The Hugging Face parts of a whole Megatron tensor; the exact inverse of `slices_of`."""
    if is_qkv(name):
        groups, width = architecture.num_query_groups, architecture.kv_channels
        queries = architecture.num_attention_heads // groups
        rows = tensor.reshape(groups, queries + 2, width, *tensor.shape[1:])
        return [part.reshape(-1, *tensor.shape[1:]).contiguous() for part in rows.split([queries, 1, 1], dim=1)]
    if is_gate_and_up(name):
        return [part.contiguous() for part in tensor.chunk(2, dim=0)]
    return [tensor]


def hf_state(part: ModelPart) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and tensors of a model that is whole on this rank (one tensor rank, one stage).

    Adapters are left out.
    """
    for name, parameter in part.named_parameters():
        if is_adapter(name):
            continue
        whole = values_of(parameter)
        if name in VOCABULARY:
            whole = whole[: part.architecture.vocab_size]
        yield from zip(hf_names(name, part.architecture), to_hf(name, whole, part.architecture), strict=True)


class _Target:
    """A parameter and its slices.

    Each slice is written to its place. An FP8 parameter cannot be written in part: the values are collected in a
    separate tensor, and copied together when the last slice is there.
    """

    def __init__(self, parameter: torch.nn.Parameter, slices: Sequence[Slice]) -> None:
        self.slices = slices
        self.is_quantized = is_quantized(parameter)
        self._parameter = parameter
        self._num_missing = len(slices)
        self._values: torch.Tensor | None = None if self.is_quantized else parameter.detach()

    def write(self, one: Slice, values: torch.Tensor) -> None:
        """Copies a slice's values to its place."""
        if self._values is None:
            like = self._parameter
            self._values = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        self._values[one.to : one.to + one.num_rows].copy_(values)

    def count(self, num_slices: int) -> None:
        """Counts complete slices."""
        self._num_missing -= num_slices
        if self.is_quantized and self._num_missing == 0:
            assert self._values is not None
            fill(self._parameter, self._values)
            self._values = None


_Job = tuple[_Target, list[Slice]]
Change = Callable[[Slice, torch.Tensor], torch.Tensor]


def _targets(part: ModelPart) -> Iterator[_Target]:
    shapes = hf_shapes(part.architecture)
    for name, parameter in part.named_parameters():
        if is_adapter(name):
            continue
        num_rows, axis = parameter.shape[0], part.layout.expert_tensor if is_expert(name) else part.layout.tensor
        slices = slices_of(name, part.architecture, shapes, rank=axis.rank, size=axis.size, num_rows=num_rows)
        num_read = sum(one.num_rows for one in slices)
        assert num_read == num_rows or name in VOCABULARY, name
        if num_read < num_rows:
            parameter.detach()[num_read:].zero_()
        yield _Target(parameter, slices)


def _as_they_are(one: Slice, values: torch.Tensor) -> torch.Tensor:
    return values


def _read_file(files: WeightFiles, line: _Line, change: Change, file: str, jobs: Iterable[_Job]) -> None:
    """Reads a file's slices in file order, except that those of one parameter stay together."""
    with files.open(file) as handle:
        order = {tensor: number for number, tensor in enumerate(handle.offset_keys())}

        def place(one: Slice) -> tuple[int, ...]:
            return *files.place_of(one.tensor, order), one.start

        in_order = [(target, sorted(slices, key=place)) for target, slices in jobs]
        for target, slices in sorted(in_order, key=lambda job: place(job[1][0])):
            for one in slices:
                for chunk in one.in_chunks(max(1, CHUNK_BYTES * one.num_rows // files.size_of(one))):
                    target.write(chunk, change(chunk, files.read(handle, chunk)))
                    line.update()
            target.count(len(slices))
    line.update(num_files=1)


class _Line:
    """The progress line of loading, shared by all threads."""

    def __init__(
        self,
        title: str,
        files: WeightFiles,
        num_files: int,
        num_bytes: int,
        report: Callable[[str], None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._files, self._report, self._clock = title, files, report, clock
        self._num_files, self._num_bytes = num_files, num_bytes
        self._done = 0
        self._lock = Lock()
        self._shown_at = clock()
        self._is_shown = False

    def update(self, num_files: int = 0) -> None:
        """Counts complete files, and shows the line when it is due."""
        with self._lock:
            self._done += num_files
            if self._clock() - self._shown_at >= LINE_INTERVAL_S:
                self._show()

    def end(self) -> None:
        """Shows the last state, where an earlier one was shown."""
        if self._is_shown:
            self._show()

    def _show(self) -> None:
        if self._report is not None:
            read, total = self._files.bytes_read / 1e9, self._num_bytes / 1e9
            self._report(f"{self._title}: {self._done} of {self._num_files} files, {read:.1f} of {total:.1f} GB")
        self._shown_at, self._is_shown = self._clock(), True
