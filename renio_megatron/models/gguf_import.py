"""Import of SmolLM2-135M-Instruct from a GGUF file as a Hugging Face model directory.

Run as ``python -m renio_megatron.models.gguf_import FILE.gguf DIRECTORY``; ``scripts/get_smollm2.sh`` fetches the file.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from renio_megatron.errors import CheckpointError, ConfigError, RenioError

SMOLLM2 = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SMOLLM2_ROPE_THETA = 100_000.0
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Attribute of a tokenizer -> its name in the GGUF file."""


def import_gguf(gguf: str | Path, directory: str | Path) -> Path:
    """Writes the model of a GGUF file, unpacked to bfloat16, and its tokenizer to `directory`, which it returns.

    The directory is written under a temporary name and renamed when complete.

    Raises:
        ConfigError: the packages that read GGUF are missing. CheckpointError: no such file, the directory is there
            already, or the model is not SmolLM2-135M-Instruct.
    """
    gguf, directory = Path(gguf), Path(directory)
    if not gguf.is_file():
        raise CheckpointError(f"There is no file {str(gguf)!r}.")
    if directory.exists():
        raise CheckpointError(f"{str(directory)!r} is there already; remove it, or choose another name.")
    model, tokenizer = _load(gguf)
    check_smollm2(model.config, tokenizer)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    return partial.rename(directory)


def check_smollm2(config: Any, tokenizer: Any) -> None:
    """Raises `CheckpointError` naming every value in which the model differs from SmolLM2-135M-Instruct."""
    found = {name: getattr(config, name, None) for name in SMOLLM2}
    wrong = [f"{name} {found[name]!r}, not {value!r}" for name, value in SMOLLM2.items() if found[name] != value]
    rope_theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if rope_theta != SMOLLM2_ROPE_THETA:
        wrong.append(f"rope_theta {rope_theta!r}, not {SMOLLM2_ROPE_THETA!r}")
    if tokenizer.eos_token != "<|im_end|>":
        wrong.append(f"eos_token {tokenizer.eos_token!r}, not '<|im_end|>'")
    if not tokenizer.chat_template:
        wrong.append("no chat template")
    if wrong:
        raise CheckpointError(f"The GGUF file does not hold SmolLM2-135M-Instruct as expected: {'; '.join(wrong)}.")


def set_special_tokens(tokenizer: Any, gguf: Path) -> None:
    """Sets a tokenizer's special tokens to those that the file names by their ids.

    transformers 5.17 uses the beginning-of-text token as the end token, too, and no padding token; with that end token
    no completion would ever end.
    """
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    for attribute, name in SPECIAL_TOKENS.items():
        if (field := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(field.contents())))


def _load(gguf: Path) -> tuple[Any, Any]:
    try:
        import accelerate  # noqa: F401
        import gguf as _gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError("Reading a GGUF file needs two packages: pip install gguf accelerate.") from error
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    packed = getattr(transformers, "GgufConfig", None)  # newer transformers keep the weights packed by default
    if packed is not None:
        options["quantization_config"] = packed(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(gguf.parent), **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    set_special_tokens(tokenizer, gguf)
    # save_pretrained refuses a model that is still marked as quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return model.to(torch.bfloat16), tokenizer


def main() -> None:
    """Entry point of ``python -m``: FILE.gguf and DIRECTORY."""
    parser = argparse.ArgumentParser(description="Turn the GGUF file of SmolLM2-135M-Instruct into a model directory.")
    parser.add_argument("gguf", help="the .gguf file")
    parser.add_argument("directory", help="the model directory to write")
    arguments = parser.parse_args()
    try:
        print(import_gguf(arguments.gguf, arguments.directory))
    except RenioError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
