"""The run's metrics, as Ray exports them to Prometheus: names, kinds, labels."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ray.util.metrics import Counter, Gauge

LABEL = "run"  # of every metric: the last part of the run's folder


class Kind(NamedTuple):
    """What a metric is.

    Attributes:
        label: by which it is told apart, besides the run; "" where by none.
    """

    kind: Literal["counter", "gauge"]
    label: str
    about: str


METRICS = {
    "voxflux_samples": Kind("counter", "", "Samples made by data workers"),
    "voxflux_trained_samples": Kind("counter", "", "Samples trained on, over all ranks"),
    "voxflux_bytes": Kind("counter", "", "Bytes of objects read by data workers"),
    "voxflux_fetch_seconds": Kind("counter", "", "Seconds in which read tasks waited for objects"),
    "voxflux_transform_seconds": Kind("counter", "", "Seconds of decoding, cropping and augmenting"),
    "voxflux_retries": Kind("counter", "status", "Requests tried again, by what had gone wrong"),
    "voxflux_composites": Kind("counter", "", "Composite objects made"),
    "voxflux_stall_seconds": Kind("counter", "cause", "Seconds in which a rank waited for data, mean over ranks"),
    "voxflux_starts": Kind("counter", "", "Starts of the training processes; the first is one"),
    "voxflux_quarantined": Kind("gauge", "", "Cases in quarantine"),
    "voxflux_au": Kind("gauge", "", "Accelerator utilisation of the epoch so far, 0 to 1"),
    "voxflux_samples_per_second": Kind("gauge", "", "Samples trained on a second in this epoch, over all ranks"),
    "voxflux_loss": Kind("gauge", "", "Loss of the newest step of rank 0"),
    "voxflux_dice": Kind("gauge", "class", "Held-out Dice; the class `mean` is over all"),
    "voxflux_learning_rate": Kind("gauge", "", "Learning rate of the newest step"),
    "voxflux_epoch": Kind("gauge", "", "Epoch under way, from 1"),
    "voxflux_step": Kind("gauge", "", "Optimiser steps so far"),
}
"""Name, before Ray's prefix `ray_`; Prometheus also ends a counter's name in `_total`."""


def exported_name(name: str) -> str:
    """A metric's name on Ray's Prometheus endpoint."""
    return f"ray_{name}" + ("_total" if METRICS[name].kind == "counter" else "")


class Gauges:
    """Sets and counts; to be made in a process of a running Ray."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        for name, (kind, label, about) in METRICS.items():
            labels = (LABEL, label) if label else (LABEL,)
            if kind == "counter":
                self._counters[name] = Counter(name, description=about, tag_keys=labels)
            else:
                self._gauges[name] = Gauge(name, description=about, tag_keys=labels)

    def count(self, name: str, value: float, label: str = "") -> None:
        """Add to a counter; adding nothing is nothing."""
        if value > 0:
            self._counters[name].inc(value, self._labels(name, label))

    def set(self, name: str, value: float | None, label: str = "") -> None:
        """Set a gauge; None leaves it."""
        if value is not None:
            self._gauges[name].set(value, self._labels(name, label))

    def _labels(self, name: str, label: str) -> dict[str, str]:
        return {LABEL: self._run, METRICS[name].label: label} if METRICS[name].label else {LABEL: self._run}
