"""Import and export of PEFT adapter directories: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from renio_megatron.config import LoraConfig
from renio_megatron.errors import ConfigError
from renio_megatron.files import as_others_are
from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.megatron.model.lora import is_adapter
from renio_megatron.megatron.weights.peft_config import CONFIG, WEIGHTS, PeftAdapter, block_of, read_adapter_config
from renio_megatron.models.finite import require_finite

_NAME = re.compile(r"decoder\.layers\.(\d+)\.(self_attention|mlp)\.\w+\.adapters\.(\w+)_([ab])")
_BLOCKS = {"self_attention": "self_attn", "mlp": "mlp"}


def adapter_state(part: ModelPart) -> dict[str, torch.Tensor]:
    """PEFT's names and tensors of the adapters of a model that is whole on this rank."""
    found = {}
    for name, parameter in _adapters(part):
        found[_peft_name(name)] = parameter.detach()
    return found


def merged(state: dict[str, torch.Tensor], part: ModelPart) -> dict[str, torch.Tensor]:
    """The state with W + scale B A in place of each W that has an adapter, summed in fp32, in the dtype of W.

    Args:
        state: `hf.hf_state` of `part`.
        part: a model that is whole on this rank.
    """
    adapters, result = adapter_state(part), dict(state)
    for name, down in adapters.items():
        if not name.endswith(".lora_A.weight"):
            continue
        up = adapters[name.replace(".lora_A.", ".lora_B.")]
        target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        weight = state[target]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        change = part.lora.scale * (up.to(dtype) @ down.to(dtype))
        result[target] = (weight.to(dtype) + change).to(weight.dtype)
    return result


def write_adapter(
    state: dict[str, torch.Tensor], lora: LoraConfig, model: Path, directory: Path, start: str | None = None
) -> None:
    """Writes adapters in PEFT's format.

    Args:
        state: `adapter_state` of a model.
        lora: settings of the adapters.
        model: directory of their base model.
        directory: directory to write to.
        start: their initialization, as in `peft_config.PeftAdapter`.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": list(lora.names),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": start or True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    as_others_are(directory / WEIGHTS)


def check_adapter(directory: Path, lora: LoraConfig) -> PeftAdapter:
    """The adapter in a directory, checked against the settings.

    Raises:
        ConfigError: it holds no adapter, or another than the settings describe.
    """
    adapter = read_adapter_config(directory, "lora.adapter")
    there, here = adapter.lora, lora
    pairs = {
        "lora.r": (there.r, here.r),
        "lora.alpha": (there.alpha, here.alpha),
        "lora.use_rslora": (there.use_rslora, here.use_rslora),
        "lora.targets": (list(there.names), list(here.names)),
    }
    differing = [f"{key}: {one} there, {other} here" for key, (one, other) in pairs.items() if one != other]
    if differing:
        raise ConfigError(
            f"lora.adapter: {directory / CONFIG} is of another adapter ({'; '.join(differing)}). Set the values that "
            "it has."
        )
    return adapter


def load_adapter(part: ModelPart, directory: Path) -> None:
    """Fills this rank's adapters from a PEFT directory; `check_adapter` has been called.

    Raises:
        ConfigError: a tensor that is missing, has no adapter in the model, or has another shape.
    """
    path, tensor = directory / WEIGHTS, part.layout.tensor
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            names = set(file.keys())
            check_names(path, names, part.architecture.num_layers, part.lora.names, "lora.adapter")
            for name, parameter in _adapters(part):
                whole = file.get_tensor(_peft_name(name))
                axis = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]
                wanted = [n * (tensor.size if at == axis else 1) for at, n in enumerate(parameter.shape)]
                if list(whole.shape) != wanted:
                    raise ConfigError(
                        f"lora.adapter: {_peft_name(name)} in {path} has the shape {list(whole.shape)}, the model "
                        f"needs {wanted}. It was trained beside another model."
                    )
                require_finite(whole, f"lora.adapter: {_peft_name(name)} in {path}")
                parameter.copy_(whole if axis is None else whole.chunk(tensor.size, axis)[tensor.rank])
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"lora.adapter: {path} cannot be read: {error}.") from error


def check_names(path: Path, names: set[str], num_layers: int, targets: Sequence[str], setting: str) -> None:
    """Raises `ConfigError`, which names `setting`, where a file's tensors are not those of every layer of a model."""
    wanted = {
        f"base_model.model.model.layers.{layer}.{block_of(target)}.{target}.lora_{which}.weight"
        for layer in range(num_layers)
        for target in targets
        for which in "AB"
    }
    for what, which in (("lacks", wanted - names), ("has, without a counterpart,", names - wanted)):
        if which:
            raise ConfigError(
                f"{setting}: {path} {what} {sorted(which)[0]!r} ({len(which)} such tensors). It was trained beside "
                "another model, or with settings that these adapters do not know."
            )


def _adapters(part: ModelPart) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in part.named_parameters() if is_adapter(name))


def _peft_name(name: str) -> str:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    layer, block, target, which = match.groups()
    return f"base_model.model.model.layers.{layer}.{_BLOCKS[block]}.{target}.lora_{which.upper()}.weight"
