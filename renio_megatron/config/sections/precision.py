"""Settings of the layers' backend and of FP8, under Megatron's names where there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from renio_megatron.config.validators import require_choice
from renio_megatron.errors import ConfigError

FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Backend and precision of one model's layers: `precision` for the student, `teacher_precision` for the teacher.

    The dtype of the parameters is `train.bf16`. The LM head stays out of FP8: its logits decide the weights.

    Attributes:
        backend: `te`, Transformer Engine's modules; `local`, Megatron's own on plain torch; `auto`, te for bf16 models
            on a GPU where Transformer Engine imports, else local; local for a student with adapters.
        fp8: `hybrid` (e4m3 forward, e5m2 gradients) or `e4m3` products of the decoder's linear layers, as Megatron's
            `--fp8-format`; null: none.
        fp8_recipe: how values are scaled into the range of FP8, as Megatron's `--fp8-recipe`.
        fp8_param_gather: as in Megatron: parameters are stored, and gathered by the distributed optimizer, in FP8. A
            teacher's are always stored in FP8: they are quantized once.
        first_last_layers_bf16, num_layers_at_start_in_bf16, num_layers_at_end_in_bf16: as in Megatron: that many of the
            first and last layers stay out of FP8.
        emulate_fp8: round the inputs of FP8 products to FP8 values, and multiply in the parameters' dtype. Needs
            neither Transformer Engine nor a GPU, saves no time or memory, and shows the numerical effect of FP8.
    """

    backend: str = "auto"
    fp8: str | None = None
    fp8_recipe: str = "tensorwise"
    fp8_param_gather: bool = False
    first_last_layers_bf16: bool = False
    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1
    emulate_fp8: bool = False

    section: ClassVar[str] = "precision"

    def __post_init__(self) -> None:
        require_choice(f"{self.section}.backend", self.backend, ("auto", "te", "local"))
        require_choice(f"{self.section}.fp8_recipe", self.fp8_recipe, FP8_RECIPES)
        if self.fp8 is not None:
            require_choice(f"{self.section}.fp8", self.fp8, ("hybrid", "e4m3"))
        for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{self.section}.{key} must be at least 0; got {getattr(self, key)}.")
        if self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            raise ConfigError(
                f"{self.section}.first_last_layers_bf16=true with fp8_recipe=delayed: Megatron cannot leave layers out "
                "of delayed scaling. Choose fp8_recipe=tensorwise."
            )
        if self.fp8_param_gather and self.fp8_recipe in ("delayed", "mxfp8"):
            why = {
                "delayed": "the first step's weights would be rounded by a scale that nothing has measured yet",
                "mxfp8": "its weights are gathered in the gradients' buffer, which this trainer does not prepare",
            }[self.fp8_recipe]
            raise ConfigError(
                f"{self.section}.fp8_param_gather=true with fp8_recipe={self.fp8_recipe}: {why}. "
                "Choose fp8_recipe=tensorwise or blockwise, or fp8_param_gather=false."
            )
        if self.emulate_fp8 and self.backend == "te":
            raise ConfigError(
                f"{self.section}.emulate_fp8=true with backend=te: Transformer Engine has FP8 itself. Remove one "
                "of them."
            )
        if self.emulate_fp8 and self.fp8_recipe == "delayed":
            raise ConfigError(
                f"{self.section}.emulate_fp8=true with fp8_recipe=delayed: its scales come from earlier steps, which "
                "the emulation does not keep. Choose tensorwise, blockwise or mxfp8."
            )
        if self.fp8 is not None and self.backend == "local" and not self.emulate_fp8:
            raise ConfigError(
                f"{self.section}.fp8={self.fp8} with backend=local: FP8 products are Transformer Engine's. Set "
                f"{self.section}.backend=te, or {self.section}.emulate_fp8=true to see what their rounding does."
            )


@dataclass(frozen=True, kw_only=True)
class TeacherPrecisionConfig(PrecisionConfig):
    """Backend and precision of the teacher's layers."""

    section: ClassVar[str] = "teacher_precision"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fp8 is not None and self.fp8_recipe == "delayed":
            raise ConfigError(
                "teacher_precision.fp8_recipe=delayed: its scales come from training steps, which a teacher never "
                "takes; they would stay 1. Choose tensorwise, blockwise or mxfp8."
            )
