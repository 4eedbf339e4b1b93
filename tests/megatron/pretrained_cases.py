"""Checkpoints as Megatron-LM writes them, from plain GPTModels in several layouts, and what this package reads of them.

The writer is Megatron's own: its local spec unchanged, its padding of the vocabulary to multiples of 128, its
`dist_checkpointing.save` of {"model", "args", ...}, its file with the last iteration. The tensors come from Hugging
Face's files through `tests/helpers/whole_tensors.py`, which shares nothing with the readers.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from renio_megatron.config import LoraConfig, ParallelConfig, TeacherConfig, TrainConfig
from tests.helpers.resuming import error_of, run, run_config, train_config
from tests.helpers.training_cases import VOCAB_SIZE, layout_of
from tests.helpers.whole_tensors import take_shard, to_megatron

TP2, PP2 = ParallelConfig(tensor_model_parallel_size=2), ParallelConfig(pipeline_model_parallel_size=2)
WRITTEN: dict[str, tuple[str, ParallelConfig, dict[str, Any]]] = {
    # name -> (model, layout, Megatron's metadata)
    "TP2": ("deep", TP2, {}),
    "PP2": ("deep", PP2, {}),
    "PP2 tied": ("deep_tied", PP2, {}),
    "TP2 a name for each layer": ("deep", TP2, {"non_homogeneous_layers": True}),
    "PP2 single shards": ("deep", PP2, {"singleton_local_shards": True}),
    "TP2 teacher": ("teacher", TP2, {}),
}
READ = {
    "DP2": ParallelConfig(),
    "TP2 + SP": layout_of(2, sp=True),
    "PP2": PP2,
    "PP2 x VPP2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
}


def write(folder: Path, name: str) -> None:
    """Writes one of `WRITTEN` to `folder / name`."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from renio_megatron.config import PrecisionConfig
    from renio_megatron.megatron.model.transformer_config import transformer_config
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.megatron.runtime.mcore_compat import own_writer
    from renio_megatron.models.architecture import Architecture
    from renio_megatron.models.param_map import hf_names

    directory, parallel, metadata = WRITTEN[name]
    layout = start(parallel, seed=3)
    architecture = Architecture.from_directory(folder / directory)
    config = transformer_config(architecture, parallel, TrainConfig(), PrecisionConfig(), trained=True)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=architecture.qk_layernorm, normalization="RMSNorm"),
        vocab_size=128 * parallel.tensor_model_parallel_size,
        max_sequence_length=architecture.max_sequence_length,
        pre_process=layout.pipeline.is_first,
        post_process=layout.pipeline.is_last,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
    )
    whole, first = load_file(folder / directory / "model.safetensors"), get_transformer_layer_offset(config)
    for local, parameter in model.named_parameters():
        parts = local.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) + first)
        full = ".".join(parts)
        tensor = to_megatron(full, [whole[each] for each in hf_names(full, architecture)], architecture)
        if "word_embeddings" in full or "output_layer" in full:  # noise in the rows of no token, as of random weights
            noise = torch.randn(128 * layout.tensor.size - VOCAB_SIZE, tensor.shape[1])
            tensor = torch.cat([tensor, noise])
        parameter.data.copy_(take_shard(full, tensor, parameter, layout.tensor.rank, layout.tensor.size))
    given = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True), **metadata}
    moment = torch.zeros(4)
    content = {
        "args": argparse.Namespace(num_layers=4, params_dtype=torch.float32),
        "checkpoint_version": 3.0,
        "iteration": 3,
        "model": model.sharded_state_dict(metadata=given),
        "optimizer": {"moment": ShardedTensor.from_rank_offsets("optimizer.state.m", moment, replica_id=layout.rank)},
    }
    target = folder / "megatron" / name / "iter_0000003"
    if layout.is_main:
        target.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(content, str(target), **own_writer())
    if layout.is_main:
        (target.parent / "latest_checkpointed_iteration.txt").write_text("3")
    dist.barrier()


def describe(folder: Path) -> None:
    """Models whose weights are nowhere but in a checkpoint."""
    for name in ("deep", "teacher"):
        shutil.copytree(folder / name, folder / f"{name} described", ignore=shutil.ignore_patterns("*.safetensors"))


def read(name: str, reader: str, folder: Path) -> dict[str, bool]:
    """`compare` of one of `WRITTEN`, in one of `READ` or in a special way."""
    if reader == "bf16":
        return compare(folder, name, TP2, TrainConfig(bf16=True))
    if reader == "adapters":
        return compare(folder, name, PP2, lora=LoraConfig(r=2))
    if reader == "fewer tokens":
        return compare(folder, name, TP2, vocab_size=13)
    return compare(folder, name, READ[reader])


def compare(
    folder: Path,
    name: str,
    parallel: ParallelConfig,
    train: TrainConfig | None = None,
    lora: LoraConfig | None = None,
    vocab_size: int = VOCAB_SIZE,
) -> dict[str, bool]:
    """Parameter -> whether a checkpoint gives the bits that Hugging Face's files give, in a layout of the reader's."""
    from renio_megatron.megatron.checkpoint.directory import find_pretrained
    from renio_megatron.megatron.weights.hf import load_weights
    from renio_megatron.megatron.weights.pretrained import load_pretrained

    directory = WRITTEN[name][0]
    mine, other = (_part(folder / directory, parallel, train, lora, vocab_size) for _ in range(2))
    load_pretrained(mine, find_pretrained(folder / "megatron" / name, "pretrained_checkpoint"))
    load_weights(other, folder / directory)
    expected = dict(other.named_parameters())
    return {key: torch.equal(value, expected[key]) for key, value in mine.named_parameters()}


def _part(
    directory: Path, parallel: ParallelConfig, train: Any = None, lora: Any = None, vocab_size: int = VOCAB_SIZE
) -> Any:
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.models.architecture import Architecture

    layout = start(parallel, seed=1)
    architecture = Architecture.from_directory(directory)
    train = train or TrainConfig()
    part = build_model(architecture, layout, parallel, train, lora=lora, vocab_size=vocab_size)
    for parameter in part.chunks[0].parameters():
        if parameter.requires_grad:  # what is not loaded must show
            torch.nn.init.zeros_(parameter) if lora is not None else torch.nn.init.constant_(parameter, 7.0)
    return part


def refused(folder: Path) -> dict[str, str]:
    from renio_megatron.megatron.weights import pretrained

    def reading(name: str, directory: str, **changes: Any) -> str:
        part = _part(folder / directory, TP2)
        part.architecture = replace(part.architecture, **changes)
        return error_of(lambda: pretrained.load_pretrained(part, folder / "megatron" / name / "iter_0000003"))

    return {
        "tied": reading("TP2", "deep_tied"),
        "untied": reading("PP2 tied", "deep"),
        "shape": reading("TP2 teacher", "deep"),
        "layers": reading("TP2", "student"),
        "vocabulary": reading("TP2", "deep", vocab_size=300),
    }


def runs(folder: Path) -> dict[str, Any]:
    """Runs whose student and teacher are checkpoints, beside the same of Hugging Face's files; one from a run's own."""
    megatron = folder / "megatron"
    lora = LoraConfig(r=2)
    plain = run_config(folder, "plain", model=str(folder / "deep"), train=train_config(train_iters=2))
    given = replace(
        plain,
        model=str(folder / "deep described"),
        pretrained_checkpoint=str(megatron / "PP2"),
        teacher=TeacherConfig(
            model=str(folder / "teacher described"), pretrained_checkpoint=str(megatron / "TP2 teacher")
        ),
        output_dir=str(folder / "given"),
    )
    expected, found = run(plain), run(given)
    own = replace(given, pretrained_checkpoint=str(folder / "plain"), output_dir=str(folder / "own"), lora=lora)
    went_on = run(own)
    frozen = {key: value for key, value in went_on["parameters"].items() if ".adapters." not in key}
    other = replace(own, pretrained_checkpoint=str(folder / "own"), output_dir=str(folder / "of adapters"))
    moved = replace(own, pretrained_checkpoint=str(megatron / "PP2"))
    with contextlib.suppress(FileNotFoundError):
        if dist.get_rank() == 0:
            (folder / "own" / "finished.json").unlink()
            text = (folder / "own" / "config.yaml").read_text()
            (folder / "own" / "config.yaml").write_text(text.replace(str(folder / "plain"), str(megatron / "PP2")))
    dist.barrier()
    return {
        "same": all(torch.equal(value, found["parameters"][key]) for key, value in expected["parameters"].items()),
        "own": all(torch.equal(value, expected["parameters"][key]) for key, value in frozen.items()) and len(frozen),
        "adapters": error_of(lambda: run(other)),
        "other base": error_of(lambda: run(moved)),
    }
