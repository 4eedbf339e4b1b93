"""Settings of what is saved, and what a new run is loaded from."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.config.validators import require_choice, require_positive


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, into `output_dir/checkpoints`, and where a new run takes it from.

    Attributes:
        save_interval: steps between checkpoints; the last step is saved in any case.
        ckpt_format: `torch_dist`, Megatron's distributed format.
        keep_last: checkpoints that are kept, the newest ones; null keeps all.
        async_save: write in a process of its own while training goes on. The memory of the state is needed twice
            until it is written. The last save of a run is waited for.
        load: where a run starts from that has no checkpoint of its own yet: another run's output_dir, its checkpoints
            directory, or one iter_ directory, in any layout. Weights, optimizer, step, place in the data and moving
            averages are taken over.
    """

    save_interval: int = 100
    ckpt_format: str = "torch_dist"
    keep_last: int | None = None
    async_save: bool = False
    load: str | None = None

    def __post_init__(self) -> None:
        require_positive("checkpoint", save_interval=self.save_interval, keep_last=self.keep_last)
        require_choice("checkpoint.ckpt_format", self.ckpt_format, ("torch_dist",))
