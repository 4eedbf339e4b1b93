"""Learning-rate schedule, with Megatron's settings."""

from __future__ import annotations

import math

from renio_megatron.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step` = 1, 2, ..., train_iters.

    Linear warm-up over `lr_warmup_iters` steps, then `lr_decay_style` from `lr` towards `min_lr`, which it reaches one
    step after `lr_decay_iters` (of a run's last step, where that is not given: no step is spent on it).

    >>> train = TrainConfig(train_iters=4, lr=1.0, lr_decay_style="linear")
    >>> [learning_rate(train, step) for step in (1, 2, 3, 4)]
    [1.0, 0.75, 0.5, 0.25]
    >>> train = TrainConfig(train_iters=4, lr=1.0, lr_decay_style="linear", lr_decay_iters=2, min_lr=0.1)
    >>> [round(learning_rate(train, step), 2) for step in (1, 2, 3, 4)]
    [1.0, 0.55, 0.1, 0.1]
    """
    done = step - 1
    if done < train.lr_warmup_iters:
        return train.lr * step / train.lr_warmup_iters
    end = train.decay_end
    if end is None:
        return train.lr
    progress = min(1.0, (done - train.lr_warmup_iters) / (end - train.lr_warmup_iters))
    left = 1.0 - progress if train.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.min_lr + (train.lr - train.min_lr) * left
