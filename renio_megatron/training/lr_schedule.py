"""Learning-rate schedule, with Megatron's settings."""

from __future__ import annotations

import math

from renio_megatron.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step` = 1, 2, ..., train_iters.

    Linear warm-up over `lr_warmup_iters` steps, then `lr_decay_style` from `lr` towards `min_lr`; the decay would reach
    `min_lr` one step after the last, so no step is spent on it.

    >>> train = TrainConfig(train_iters=4, lr=1.0, lr_decay_style="linear")
    >>> [learning_rate(train, step) for step in (1, 2, 3, 4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    done = step - 1
    if done < train.lr_warmup_iters:
        return train.lr * step / train.lr_warmup_iters
    if train.lr_decay_style == "constant":
        return train.lr
    progress = (done - train.lr_warmup_iters) / (train.train_iters - train.lr_warmup_iters)
    left = 1.0 - progress if train.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.min_lr + (train.lr - train.min_lr) * left
