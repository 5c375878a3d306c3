"""The optimiser as configured, and its learning rate at every position."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ingest.errors import ConfigError
from train.optimizer import OptimizerConfig, learning_rate_at, make_optimizer, set_learning_rate


def test_the_mlperf_warm_up_rises_by_the_epoch_and_then_stays() -> None:
    config = OptimizerConfig()
    # init + (0.8 - init) * e / 200 in epoch e counted from 1, as the reference's loop does.
    assert learning_rate_at(config, 0) == pytest.approx(1e-4 + (0.8 - 1e-4) / 200)
    assert learning_rate_at(config, 99) == pytest.approx(1e-4 + (0.8 - 1e-4) / 2)
    assert learning_rate_at(config, 199) == pytest.approx(0.8)
    assert learning_rate_at(config, 200) == 0.8
    assert learning_rate_at(config, 5000) == 0.8


def test_by_epoch_the_rate_is_the_same_at_every_step() -> None:
    config = OptimizerConfig(warmup_epochs=5)
    assert {learning_rate_at(config, 2, step, 10) for step in range(10)} == {learning_rate_at(config, 2)}


def test_by_step_the_warm_up_meets_the_one_by_epoch_at_the_end_of_each_epoch() -> None:
    by_epoch = OptimizerConfig(warmup_epochs=4)
    by_step = OptimizerConfig(warmup_epochs=4, update="step")
    for epoch in range(6):
        assert learning_rate_at(by_step, epoch, 9, 10) == pytest.approx(learning_rate_at(by_epoch, epoch))
    rates = [learning_rate_at(by_step, step // 10, step % 10, 10) for step in range(40)]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(1e-4 + (0.8 - 1e-4) / 40)
    assert len(set(rates)) == 40


def test_without_a_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate_at(OptimizerConfig(warmup_epochs=0), 0) == 0.8


def test_the_rate_falls_after_each_of_the_given_epochs() -> None:
    config = OptimizerConfig(
        learning_rate=1.0, warmup_epochs=2, lr_decay_epochs=(4, 6), lr_decay_factor=0.1, update="step"
    )
    rates = [learning_rate_at(config, epoch, 0, 10) for epoch in range(2, 8)]
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


def test_the_default_optimiser_is_nesterov_sgd_over_all_parameters() -> None:
    model = nn.Linear(2, 3)
    optimizer = make_optimizer(model, OptimizerConfig())
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert group["nesterov"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 0.0)
    assert group["lr"] == learning_rate_at(OptimizerConfig(), 0)
    assert len(group["params"]) == 2


def test_sgd_without_momentum_is_plain() -> None:
    (group,) = make_optimizer(nn.Linear(2, 3), OptimizerConfig(momentum=0)).param_groups
    assert not group["nesterov"]


def test_adamw_takes_its_weight_decay() -> None:
    config = OptimizerConfig(name="adamw", learning_rate=1e-3, weight_decay=0.05, warmup_epochs=0)
    optimizer = make_optimizer(nn.Linear(2, 3), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 0.05
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_set_rate_is_the_one_that_steps() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(model, OptimizerConfig(momentum=0))
    before = model.weight.item()
    model(torch.ones(1, 1)).sum().backward()
    set_learning_rate(optimizer, 0.25)
    optimizer.step()
    assert model.weight.item() == pytest.approx(before - 0.25)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": "lamb"}, "name"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"lr_decay_factor": -1}, "lr_decay_factor"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"init_learning_rate": -1}, "init_learning_rate"),
        ({"momentum": 1.0}, "momentum"),
        ({"lr_decay_epochs": (300, 250)}, "ascend"),
        ({"lr_decay_epochs": (100,)}, "after the warm-up"),
        ({"update": "batch"}, "update"),
        ({"clip_norm": 0}, "clip_norm"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        OptimizerConfig(**fields)  # type: ignore[arg-type]
