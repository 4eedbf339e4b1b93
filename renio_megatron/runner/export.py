"""Export of a checkpoint as a Hugging Face model directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from renio_megatron.config import ParallelConfig, PrecisionConfig, TrainConfig
from renio_megatron.errors import CheckpointError, ConfigError
from renio_megatron.files import as_others_are
from renio_megatron.megatron.checkpoint.saved_model import load_model_weights, saved_base
from renio_megatron.megatron.model.build import build_model
from renio_megatron.megatron.runtime.initialize import start, stop
from renio_megatron.megatron.weights.hf import hf_state
from renio_megatron.megatron.weights.peft import adapter_state, merged, write_adapter
from renio_megatron.megatron.weights.peft_config import PeftAdapter
from renio_megatron.megatron.weights.pretrained import fingerprint, load_pretrained, start_of
from renio_megatron.megatron.weights.residual import residual_of
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.description import description_files
from renio_megatron.runner.saved_run import SavedRun, read_run

MAX_SHARD_SIZE = "5GB"


def export_checkpoint(
    run_directory: Path, destination: Path, step: int | None, *, merge: bool = False, model: str | None = None
) -> int:
    """Writes a checkpoint's weights, with the model's config and tokenizer, to `destination`; returns its step.

    The weights have the dtype of the model that the run started from if the cast is exact for all of them, else the
    dtype that they were trained in: nothing is rounded. Of a run with adapters only the adapters are written, as a PEFT
    directory; or with `merge` the whole model with the adapters merged into its weights.

    Args:
        run_directory: output_dir of a run.
        destination: a directory that does not exist yet, or is empty.
        step: which checkpoint; None: the newest.
        merge: add the adapters to their layers' weights, each sum rounded to the dtype of training.
        model: where the model that the run started from is now; None: where it was.

    Raises:
        CheckpointError, ConfigError: no such run, no such checkpoint, or a destination in use.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"the destination {str(destination)!r} exists already. Choose another, or remove it.")
    destination = destination.resolve()  # `.` has no name from which to derive a sibling's
    run = read_run(run_directory, step, moved_to=model)
    if merge and run.lora.r is None:
        raise ConfigError("--merge has nothing to merge: the run has no adapters (lora.r is null). Leave it out.")
    if run.weights != run.model and not merge:
        raise ConfigError(
            f"an adapter directory names the Hugging Face model that it stands beside, and this run's is a checkpoint "
            f"of Megatron (pretrained_checkpoint={run.pretrained!r}). Export the whole model with --merge."
        )
    architecture = Architecture.from_directory(run.model)
    removed = start_of(saved_base(run.checkpoint))
    state = _state_of(run, architecture, removed, merge=merge)

    def write(partial: Path) -> None:
        if run.lora.r is not None and not merge:
            write_adapter(state, run.lora, run.model.resolve(), partial, removed)
            return
        for path in description_files(run.model):
            shutil.copyfile(path, partial / path.name)
        _untie(architecture, partial / "config.json")
        _write_weights(_lossless(state, partial / "config.json"), partial)

    _publish(destination, write)
    return run.step


def _state_of(run: SavedRun, architecture: Architecture, removed: Any, *, merge: bool) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors by Hugging Face's names, or by PEFT's where adapters are not merged. One rank.

    The base weights of adapters are `run.weights` without those in `removed`.
    """
    lora, weights = run.lora, run.weights
    layout = start(ParallelConfig(), seed=0)
    part = build_model(
        architecture,
        layout,
        ParallelConfig(),
        TrainConfig(bf16=run.bf16),
        PrecisionConfig(),
        lora,
        vocab_size=architecture.vocab_size,
        trained=False,
    )
    base = fingerprint(weights, architecture, removed) if lora.r is not None else None
    if merge:
        change = residual_of(PeftAdapter(lora, removed), weights, architecture, layout.device)
        load_pretrained(part, weights, change=change)
    load_model_weights(run.checkpoint, part, base)
    state = dict(hf_state(part)) if lora.r is None or merge else adapter_state(part)
    if merge:
        state = merged(state, part)
    stop()  # the model cannot be used from here on
    return state


def _publish(destination: Path, write: Callable[[Path], None]) -> None:
    """Creates the destination by `write` in a temporary directory, which is renamed when complete."""
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
    except OSError as error:
        raise CheckpointError(
            f"{destination} cannot be written: {error.strerror or error}. Check disk and rights."
        ) from error


def _untie(architecture: Architecture, config_path: Path) -> None:
    """Marks an untied head in config.json: transformers also checks the weights, other programs read only this."""
    config = json.loads(config_path.read_text())
    if not architecture.tied and config.get("tie_word_embeddings") is not False:
        config["tie_word_embeddings"] = False
        config_path.write_text(json.dumps(config, indent=2) + "\n")


def _lossless(state: dict[str, torch.Tensor], config_path: Path) -> dict[str, torch.Tensor]:
    """The weights in the source model's dtype where that is exact, else unchanged; config.json records the dtype."""
    config = json.loads(config_path.read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    wanted = getattr(torch, str(config.get(key)), None)
    trained = next(iter(state.values())).dtype
    if isinstance(wanted, torch.dtype) and all(torch.equal(t.to(wanted).to(t.dtype), t) for t in state.values()):
        return {name: tensor.to(wanted) for name, tensor in state.items()}
    config[key] = str(trained).removeprefix("torch.")
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    return state


def _write_weights(state: dict[str, torch.Tensor], directory: Path) -> None:
    """Writes safetensors files of at most `MAX_SHARD_SIZE`, with an index where there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards

    shards = split_torch_state_dict_into_shards(state, max_shard_size=MAX_SHARD_SIZE)
    for filename, names in shards.filename_to_tensors.items():
        # Copies, because safetensors refuses tensors that share storage, such as slices of a padded embedding.
        tensors = {name: state[name].cpu().contiguous().clone() for name in names}
        save_file(tensors, directory / filename, metadata={"format": "pt"})
        as_others_are(directory / filename)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
