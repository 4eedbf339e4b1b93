"""Description of a model for planning, from its config.json, and its trained parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

from renio_megatron.config import LoraConfig
from renio_megatron.models.architecture import Architecture, Experts
from renio_megatron.models.shipped import model_directory


@dataclass(frozen=True)
class PlannedModel:
    """A model as described by its config.json.

    Attributes:
        name: as the recipe gives it.
        architecture: the model.
        lora: its adapters, with which the base model is frozen; none where `r` is None.
    """

    name: str
    architecture: Architecture
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def is_frozen(self) -> bool:
        """Whether only adapters are trained."""
        return self.lora.r is not None

    @property
    def experts(self) -> Experts | None:
        """Experts of each layer; None for a dense model."""
        return self.architecture.experts


def read_model(name: str, setting: str) -> PlannedModel:
    """The model of a Hugging Face directory, of which only config.json is read; `load.check_models` comes first.

    Raises:
        ConfigError: a model, or a feature of one, that neither the trainer nor the plan knows.
    """
    return PlannedModel(name, Architecture.from_description(model_directory(name, setting)))
