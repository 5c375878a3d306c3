"""One optimiser step of a rank: micro-batches, mixed precision, clipping, and whether it all stayed finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .config import Recipe
from .loss import DiceCELoss
from .optimizer import make_optimizer, set_learning_rate

BF16_CAPABILITY = (8, 0)


class StepResult(NamedTuple):
    """What a step gave, on this rank.

    Attributes:
        loss: mean over the rank's samples of this step.
        sample_losses: of each of them, in their order.
        gradient_norm: L2 norm of all gradients together, over all ranks and before clipping.
        finite: whether the loss of each sample is, and the gradient. A gradient that float16 overflowed counts as
            finite while its loss scale can still fall: that step left the weights alone, and the scale is halved.
    """

    loss: float
    sample_losses: list[float]
    gradient_norm: float
    finite: bool


class TrainStep:
    """Takes optimiser steps on one rank.

    A step's batch goes through the network in `trainer.accumulate` parts of `trainer.batch_size` samples. Each part's
    loss is weighed by its share of the samples, so their gradients add up to that of the whole batch: the loss is
    a mean over samples, of a Dice and a cross entropy of each sample alone. Batch norm is the exception, since it
    normalises by the part. Ranks exchange gradients after the last part only.

    Attributes:
        network: the bare network, whose weights are trained.
        optimizer: over its parameters.
        scaler: of the loss, and enabled only with float16.
    """

    def __init__(self, network: nn.Module, prepared: nn.Module, recipe: Recipe, device: torch.device) -> None:
        """Make the optimiser.

        Args:
            network: on `device`, in the memory format of the trainer.
            prepared: `network`, or the DistributedDataParallel around it.
            recipe: its optimizer and trainer.
            device: of this rank.
        """
        trainer = recipe.trainer
        self.network = network
        self.optimizer = make_optimizer(network, recipe.optimizer)
        self._synchronised = prepared if isinstance(prepared, DistributedDataParallel) else None
        self._model: Callable[[torch.Tensor], torch.Tensor] = prepared
        if trainer.compile:
            self._model = torch.compile(prepared, backend=trainer.compile_backend)
        self._layout = memory_format(recipe, device)
        self._loss_of = DiceCELoss()
        self._clip_norm = recipe.optimizer.clip_norm
        self._micro_batch = trainer.batch_size
        precision = precision_on(recipe, device)
        self._autocast = autocast(precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    @property
    def loss_scale(self) -> float | None:
        """The factor of the loss that keeps float16 gradients in range; None in other precisions."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's `optimizer` and `scaler`; one of another precision leaves the scale at its start."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])

    def __call__(self, image_NCDHW: torch.Tensor, label_N1DHW: torch.Tensor, rate: float) -> StepResult:
        """Take one step.

        Args:
            image_NCDHW: (N, C, D, H, W) float32 on the rank's device; not written to.
            label_N1DHW: (N, 1, D, H, W) uint8, there too.
            rate: the learning rate.

        Returns:
            Its result. That waits for the device, once, after the weights are updated, so that compute is timed as
            compute; weights of a step that is not finite are not to be saved.
        """
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        images, labels = (torch.split(whole, self._micro_batch) for whole in (image_NCDHW, label_N1DHW))
        losses_N: list[torch.Tensor] = []
        for number, (image, label) in enumerate(zip(images, labels, strict=True), start=1):
            with self._not_synchronised() if number < len(images) else contextlib.nullcontext():
                with self._autocast():
                    logits = self._model(image.to(memory_format=self._layout))
                losses = self._loss_of.by_sample(logits, label)
                loss = self.scaler.scale(losses.sum() / len(image_NCDHW))
                loss.backward()  # type: ignore[no-untyped-call]  # torch's stub lacks it
            losses_N.append(losses.detach())
        self.scaler.unscale_(self.optimizer)
        norm = self._clipped_norm()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        *sample_losses, gradient_norm = torch.cat([*losses_N, norm.reshape(1)]).tolist()
        finite = all(map(math.isfinite, sample_losses)) and (math.isfinite(gradient_norm) or self._scale_can_fall())
        return StepResult(math.fsum(sample_losses) / len(sample_losses), sample_losses, gradient_norm, finite)

    def _not_synchronised(self) -> contextlib.AbstractContextManager[None]:
        if self._synchronised is None:
            return contextlib.nullcontext()
        held: contextlib.AbstractContextManager[None] = self._synchronised.no_sync()
        return held

    def _scale_can_fall(self) -> bool:
        """Whether a gradient that is not finite may be an overflow of float16, which a smaller scale cures."""
        return self.loss_scale is not None and self.loss_scale >= 1

    def _clipped_norm(self) -> torch.Tensor:
        """The gradient's norm, and, where it is asked for, the gradient clipped by it."""
        if self._clip_norm is not None:
            return nn.utils.clip_grad_norm_(self.network.parameters(), self._clip_norm)
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)


def memory_format(recipe: Recipe, device: torch.device) -> torch.memory_format:
    """How the network and its input lie in memory: channels innermost, if that is asked for and can be trusted.

    On CPUs, in half precision, it cannot: with torch 2.13 the weights' gradient of a 3x3x3 convolution of that layout
    now and then held memory that nothing had been written to, NaN or 7e10 (seen with 8 channels of 2x2x2 voxels).
    """
    trusted = device.type != "cpu" or precision_on(recipe, device) == "fp32"
    return torch.channels_last_3d if recipe.trainer.channels_last and trusted else torch.contiguous_format


def precision_on(recipe: Recipe, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16`: `auto` decided by the device."""
    wanted = recipe.trainer.precision
    if wanted != "auto":
        return wanted
    return precision_of(device.type, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


def precision_of(device_type: str, capability: tuple[int, int] | None) -> str:
    """The precision that `auto` stands for.

    Torch emulates bf16 on GPUs that lack it, and `torch.cuda.is_bf16_supported()` counts that as support. The compute
    capability tells them apart: units for bf16 came with 8.0.

    Args:
        device_type: of the torch device, such as `cuda`.
        capability: (major, minor) of a CUDA device; None of others.
    """
    if device_type != "cuda" or capability is None:
        return "fp32"
    return "bf16" if capability >= BF16_CAPABILITY else "fp16"


def autocast(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A factory of the contexts that the forward pass runs in."""
    if precision == "fp32":
        return contextlib.nullcontext
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype=dtype)
