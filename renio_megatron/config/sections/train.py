"""Settings of the optimizer and of batch sizes, under Megatron's names."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.config.validators import require_choice, require_countable, require_positive
from renio_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer, batch sizes and activation recomputation.

    Attributes:
        train_iters: optimizer steps of the whole run.
        global_batch_size: sequences of one optimizer step over all ranks.
        micro_batch_size: sequences of one forward pass, each padded to the longest of the rank.
        max_tokens_per_micro_batch: pack sequences into rows of at most this many tokens instead; null: do not pack.
        lr, min_lr, lr_warmup_iters, lr_decay_style (`constant`, `linear`, `cosine`), weight_decay, adam_beta1,
            adam_beta2, adam_eps, clip_grad (0: no clipping), bf16: as in Megatron.
        lr_decay_iters: step at which the decay of the rate ends, as in Megatron; the rate is `min_lr` after it.
            null: train_iters.
        recompute_granularity (`full`, `selective` or null), recompute_method (`uniform`, `block`) and
            recompute_num_layers: activations that are computed again in the backward pass, as in Megatron; with `full`
            null is `uniform`, and 1.
        moe_aux_loss_coeff: coefficient of the load-balancing loss of a student with experts: this times each layer's
            loss, the mean over the sequences, is added to the objective. 0: no such loss, because a student that
            follows its teacher should route as that requires, and config.json's router_aux_loss_coef is meant for
            pretraining.
        skip_nonfinite_steps: leave out a step whose gradient holds NaN or infinity, and count it in
            `train/skipped_frac`, instead of stopping. Ten in a row stop the run.
        deterministic_mode: as in Megatron, and torch's deterministic algorithms: bitwise reproducible runs in one
            layout, at some cost in speed on a GPU. On a CPU runs are reproducible anyway.
        seed: seed of sampling and of random weights.
    """

    train_iters: int = 100
    global_batch_size: int = 32
    micro_batch_size: int = 1
    max_tokens_per_micro_batch: int | None = None
    lr: float = 5.0e-6
    min_lr: float = 0.0
    lr_warmup_iters: int = 0
    lr_decay_style: str = "constant"
    lr_decay_iters: int | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1.0e-8
    clip_grad: float = 1.0
    bf16: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    moe_aux_loss_coeff: float = 0.0
    skip_nonfinite_steps: bool = False
    deterministic_mode: bool = False
    seed: int = 1234

    def __post_init__(self) -> None:
        require_positive(
            "train",
            train_iters=self.train_iters,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            max_tokens_per_micro_batch=self.max_tokens_per_micro_batch,
            recompute_num_layers=self.recompute_num_layers,
            lr_decay_iters=self.lr_decay_iters,
            lr=self.lr,
            adam_eps=self.adam_eps,
        )
        require_countable("train", global_batch_size=self.global_batch_size)
        require_choice("train.lr_decay_style", self.lr_decay_style, ("constant", "linear", "cosine"))
        if not self.moe_aux_loss_coeff >= 0:
            raise ConfigError(f"train.moe_aux_loss_coeff must be at least 0; got {self.moe_aux_loss_coeff}.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"train.seed must lie in [0, 2**63); got {self.seed}.")
        for name, beta in (("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)):
            if not 0 <= beta < 1:
                raise ConfigError(f"train.{name} must lie in [0, 1); got {beta}.")
        for name in ("min_lr", "weight_decay", "clip_grad"):  # lr is above 0
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"train.{name} must be a number of at least 0; got {getattr(self, name)}.")
        if not 0 <= self.lr_warmup_iters < self.train_iters:
            raise ConfigError(
                f"train.lr_warmup_iters must lie in [0, train_iters); got {self.lr_warmup_iters} "
                f"with train_iters={self.train_iters}."
            )
        if self.lr_decay_iters is not None and self.lr_decay_iters <= self.lr_warmup_iters:
            raise ConfigError(
                f"train.lr_decay_iters must lie above train.lr_warmup_iters={self.lr_warmup_iters}; got "
                f"{self.lr_decay_iters}. The decay begins when the warm-up ends."
            )
        if self.recompute_granularity is not None:
            require_choice("train.recompute_granularity", self.recompute_granularity, ("full", "selective"))
        if self.recompute_method is not None:
            require_choice("train.recompute_method", self.recompute_method, ("uniform", "block"))

    @property
    def decay_end(self) -> int | None:
        """The step at which the decay of the rate ends; None where it does not decay."""
        if self.lr_decay_style == "constant":
            return None
        return self.train_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def recomputed_layers(self) -> tuple[str, int] | None:
        """Method and number of layers of full recomputation; None where whole layers are not recomputed."""
        if self.recompute_granularity != "full":
            return None
        return self.recompute_method or "uniform", self.recompute_num_layers or 1
