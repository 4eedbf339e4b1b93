"""The two tiny models that ship with the package, and the lookup of model directories by name."""

from __future__ import annotations

from pathlib import Path

from renio_megatron.errors import ConfigError
from renio_megatron.files import user_path

QUICKSTART_RECIPE = Path(__file__).parent / "modchain" / "quickstart.yaml"
SHIPPED = ("modchain/student", "modchain/teacher")


def model_directory(name: str, setting: str) -> Path:
    """Directory of the model that a recipe names: one of `SHIPPED`, or a path.

    Args:
        name: the value in the recipe.
        setting: the recipe's key, for the error message.
    Raises:
        ConfigError: no such directory, no config.json in it, or an adapter next to the weights.
    """
    directory = Path(__file__).parent / name if name in SHIPPED else user_path(name)
    if not directory.is_dir():
        raise ConfigError(
            f"{setting}: there is no directory {name!r}. Give a Hugging Face model directory, "
            f"or one of the models that ship: {', '.join(SHIPPED)}."
        )
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{setting}: {str(directory)!r} holds no config.json, so it is not a Hugging Face model directory. "
            "Save the model with save_pretrained, or point to the directory that did it."
        )
    if (directory / "adapter_config.json").is_file():
        raise ConfigError(
            f"{setting}: {str(directory)!r} holds adapter_config.json beside the model, and transformers would load "
            "the model with that adapter. Move the adapter to a directory of its own (lora.adapter and teacher.adapter "
            "name one), or merge it with PEFT."
        )
    return directory
