"""The optimiser and its learning rate, as a pure function of the position in training.

The rate depends on nothing but the configuration, the epoch and the step, so a resumed run needs no scheduler
state. Source of the law: mlcommons/training, retired_benchmarks/unet3d/pytorch, `runtime/training.py` (FACTS
section 4): SGD with Nesterov momentum 0.9, rate 0.8 after a linear warm-up from 1e-4, changed **once an epoch**;
an optional multiplication by a factor after given epochs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import nn

from ingest.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The optimiser; the defaults are MLPerf's for batch 2."""

    name: Literal["sgd", "adamw"] = "sgd"
    """`sgd` (Nesterov) or `adamw`."""

    learning_rate: float = 0.8
    """Rate after the warm-up."""

    momentum: float = 0.9
    """Nesterov momentum of `sgd`; 0 for none; unused by `adamw`."""

    weight_decay: float = 0.0
    """Added to every parameter's gradient (`sgd`), or decoupled from it (`adamw`)."""

    init_learning_rate: float = 1e-4
    """Rate from which the warm-up starts."""

    warmup_epochs: float = 200
    """Epochs of linear warm-up; 0 for none. MLPerf's 200 is for 168 samples an epoch."""

    lr_decay_epochs: tuple[float, ...] = ()
    """Numbers of completed epochs after which the rate is multiplied by `lr_decay_factor`; ascending. Numbers below 1
    are shares of all epochs: 0.75 of 8 is 6."""

    lr_decay_factor: float = 1.0
    """Multiplier at each of `lr_decay_epochs`."""

    update: Literal["epoch", "step"] = "epoch"
    """How often the rate changes: once an epoch as MLPerf does, or every step, for runs of a few epochs."""

    clip_norm: float | None = None
    """Largest L2 norm of all gradients together, applied by the step; None for no clipping."""

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise ConfigError(f"name must be sgd or adamw; got {self.name!r}")
        for field in ("learning_rate", "lr_decay_factor"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f"{field} must be above 0; got {getattr(self, field)}")
        for field in ("weight_decay", "init_learning_rate", "warmup_epochs"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ConfigError(f"{field} must be 0 or more; got {getattr(self, field)}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be at least 0 and below 1; got {self.momentum}")
        if list(self.lr_decay_epochs) != sorted(set(self.lr_decay_epochs)):
            raise ConfigError(f"lr_decay_epochs must ascend without repeats; got {self.lr_decay_epochs}")
        shares = bool(self.lr_decay_epochs) and all(0 < number < 1 for number in self.lr_decay_epochs)
        if not shares and any(number < 1 or number != int(number) for number in self.lr_decay_epochs):
            raise ConfigError(
                f"lr_decay_epochs must all be whole epochs, or all be shares below 1; got {self.lr_decay_epochs}"
            )
        if self.lr_decay_epochs and not shares and self.lr_decay_epochs[0] < max(1, self.warmup_epochs):
            raise ConfigError(
                f"lr_decay_epochs must come after the warm-up of {self.warmup_epochs:g} epochs; "
                f"got {self.lr_decay_epochs}"
            )
        if self.update not in ("epoch", "step"):
            raise ConfigError(f"update must be epoch or step; got {self.update!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be above 0, or None; got {self.clip_norm}")


def in_epochs(config: OptimizerConfig, epochs: int) -> OptimizerConfig:
    """Return the settings with `lr_decay_epochs` in epochs.

    Args:
        config: the optimiser's settings.
        epochs: of the whole run. A share of them is rounded; it does not come before the end of the warm-up.
    """
    first = max(1, math.ceil(config.warmup_epochs))
    decays = {int(number) if number >= 1 else max(first, round(number * epochs)) for number in config.lr_decay_epochs}
    return dataclasses.replace(config, lr_decay_epochs=tuple(sorted(decays)))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimiser over all parameters, one group, its rate at the first step's.

    Args:
        model: The network, on the device where it will train.
        config: The optimiser's settings.

    Returns:
        SGD or AdamW (torch's default betas and epsilon).
    """
    rate = learning_rate_at(config, 0)
    if config.name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=rate,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def learning_rate_at(config: OptimizerConfig, epoch: int, step: int = 0, steps_per_epoch: int = 1) -> float:
    """The learning rate of one step of training.

    With `update="epoch"`, MLPerf's: epoch number e counted from 1 has rate `init + (rate - init) * e / warmup`
    while e is at most `warmup`, so the full rate is reached in the last epoch of the warm-up, and a decay "after
    m epochs" holds from epoch m + 1. With `update="step"` the same line is followed step by step: both modes agree
    at the last step of an epoch.

    Args:
        config: The optimiser's settings.
        epoch: Epochs completed before this step: 0 in the first.
        step: Optimiser steps of this epoch completed before this one.
        steps_per_epoch: Optimiser steps of a whole epoch; matters only with `update="step"`.

    Returns:
        The rate.

    Raises:
        ConfigError: `lr_decay_epochs` are still shares; see `in_epochs`.
    """
    if any(number < 1 for number in config.lr_decay_epochs):
        raise ConfigError(f"expected lr_decay_epochs in epochs, found shares of them: {config.lr_decay_epochs}")
    position = epoch + (1.0 if config.update == "epoch" else min(1.0, (step + 1) / steps_per_epoch))
    if position <= config.warmup_epochs:
        share = position / config.warmup_epochs
        return config.init_learning_rate + (config.learning_rate - config.init_learning_rate) * share
    passed = sum(done <= epoch for done in config.lr_decay_epochs)
    return config.learning_rate * config.lr_decay_factor**passed


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of the optimiser this rate; call it before each step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
