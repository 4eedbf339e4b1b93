"""Settings of checkpoints: what is saved, and what a new run is loaded from."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.config.validators import require_choice, require_positive


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved to `output_dir/checkpoints`, and which checkpoint a new run starts from.

    Attributes:
        save_interval: steps between checkpoints; the last step is always saved.
        ckpt_format: `torch_dist`, Megatron's distributed format.
        keep_last: checkpoints that are kept, the newest ones; null keeps all.
        async_save: write in a separate process while training continues. The state takes twice its memory until it is
            written. The last save of a run is waited for.
        load: checkpoint that a run without one of its own starts from: another run's output_dir, its checkpoints
            directory, or one iter_ directory, in any layout. Weights, optimizer, step, position in the data and moving
            averages are loaded.
    """

    save_interval: int = 100
    ckpt_format: str = "torch_dist"
    keep_last: int | None = None
    async_save: bool = False
    load: str | None = None

    def __post_init__(self) -> None:
        require_positive("checkpoint", save_interval=self.save_interval, keep_last=self.keep_last)
        require_choice("checkpoint.ckpt_format", self.ckpt_format, ("torch_dist",))
