"""Which settings may change when a run is resumed, why the others may not, and the record of each change."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from ingest.errors import ConfigError
from ingest.stores import open_store

from .config import Recipe
from .records import Event, read_events, write_events

SETTING = "setting"  # the kind of a changed setting's event


class Rule(NamedTuple):
    """What holds of a setting when a run is resumed.

    Attributes:
        verdict: `recorded`: it may change, and the change is an event of the run. `compared`: it says where the data
            lies, and the cases there are compared with the run's. `own`: the run chooses it anew at each start.
            `refused`: it may not change.
        reason: why.
    """

    verdict: Literal["recorded", "compared", "own", "refused"]
    reason: str


_WEIGHTS = Rule("refused", "the weights of its checkpoints would not fit")
_STATE = Rule("refused", "the optimizer's saved state holds it, and loading that state restores it")
_SAMPLES = Rule("refused", "its epochs would consist of other samples")
_HELD_OUT = Rule("refused", "held-out cases would be trained on, or trained ones scored")
_RATE = Rule("recorded", "the learning rate is a function of the settings and the position")
_SCORING = Rule("recorded", "scoring changes no weights")
_READING = Rule("recorded", "samples do not depend on how they are read")
_RUNNING = Rule("recorded", "it changes how the run is carried out, and no sample")

RULES: dict[str, Rule] = {
    "run_dir": Rule("own", "the folder is the one that is resumed"),
    "data.images": Rule("compared", "data may move"),
    "data.labels": Rule("compared", "data may move"),
    "data.manifest": Rule("compared", "data may move"),
    "data.eval_images": Rule("compared", "data may move"),
    "data.eval_labels": Rule("compared", "data may move"),
    "data.seed": _SAMPLES,
    "data.crop": _SAMPLES,
    "data.augment": _SAMPLES,
    "data.decode": _SAMPLES,
    "data.holdout_fraction": _HELD_OUT,
    "data.subject_pattern": _HELD_OUT,
    "data.holdout_cases": _HELD_OUT,
    "data.blocks_in_flight": _READING,
    "data.task_cpus": Rule("own", "it depends on the cluster's CPUs"),
    "data.label_selector": Rule("own", "it depends on the cluster's nodes"),
    "data.pairing": Rule("recorded", "the cases that a listing pairs are compared with the run's"),
    "data.shards": _READING,
    "data.fetch": _READING,
    "data.store": _READING,
    "data.store.transport": Rule("own", "it is chosen anew at each start"),
    "data.store.max_in_flight": Rule("own", "it is chosen with the transport"),
    "data.store.run_id": Rule("own", "it is chosen anew at each start"),
    "data.bad": Rule("recorded", "the policy holds for what is read from now on"),
    "model": _WEIGHTS,
    "optimizer.name": Rule("refused", "the optimizer's saved state would not fit"),
    "optimizer.momentum": _STATE,
    "optimizer.weight_decay": _STATE,
    "optimizer.learning_rate": _RATE,
    "optimizer.init_learning_rate": _RATE,
    "optimizer.warmup_epochs": _RATE,
    "optimizer.lr_decay_epochs": _RATE,
    "optimizer.lr_decay_factor": _RATE,
    "optimizer.update": _RATE,
    "optimizer.clip_norm": Rule("recorded", "clipping has no state"),
    "window": _SCORING,
    "trainer.num_workers": Rule("recorded", "the rest of an epoch is dealt to any number of ranks"),
    "trainer.max_workers": Rule("recorded", "the rest of an epoch is dealt to any number of ranks"),
    "trainer.cpus_per_worker": Rule("own", "it depends on the cluster's CPUs"),
    "trainer.resources_per_worker": _RUNNING,
    "trainer.use_gpu": _RUNNING,
    "trainer.batch_size": Rule("recorded", "the rest of an epoch is dealt in batches of any size"),
    "trainer.accumulate": Rule("recorded", "the rest of an epoch is dealt in batches of any size"),
    "trainer.epochs": Rule("recorded", "epochs do not depend on how many there are"),
    "trainer.evaluate_from": _SCORING,
    "trainer.evaluate_every": _SCORING,
    "trainer.quality_threshold": _SCORING,
    "trainer.precision": Rule("recorded", "weights and gradients are kept in float32 with any"),
    "trainer.compile": _RUNNING,
    "trainer.compile_backend": _RUNNING,
    "trainer.torch_threads": _RUNNING,
    "trainer.prefetch_batches": _RUNNING,
    "trainer.max_failures": _RUNNING,
    "trainer.checkpoints_kept": _RUNNING,
    "trainer.checkpoint_every_steps": _RUNNING,
    "trainer.check_resources": _RUNNING,
    "trainer.resume": Rule("own", "it names the folder"),
    "trainer.ledger": Rule("recorded", "each start records its own steps"),
    "trainer.tensorboard": _RUNNING,
    "trainer.mlflow": _RUNNING,
    "trainer.channels_last": _RUNNING,
    "trainer.deterministic": _RUNNING,
    "demo.cases": Rule("refused", "its data would be other cases"),
    "demo.shape": Rule("refused", "its data would be other cases"),
    "demo.data_dir": Rule("compared", "data may move"),
    "demo": Rule("compared", "the cases are compared with the run's"),
}
"""What holds of each setting: a rule's name covers what lies below it, and the longest name counts."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting that differs from the one the run had."""

    setting: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.setting} {_shown(self.before)} -> {_shown(self.now)}"


def rule_of(setting: str) -> Rule:
    """The rule of a setting, such as `data.crop.patch`.

    Raises:
        KeyError: no rule covers it.
    """
    name = setting
    while name not in RULES:
        name, dot, _ = name.rpartition(".")
        if not dot:
            raise KeyError(f"no rule of RULES says whether {setting} may change when a run is resumed")
    return RULES[name]


def settings_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a configuration by its dotted name, and its value."""
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def changes_of(before: Recipe, now: Recipe, run_dir: str) -> list[Change]:
    """The changes that a resumed run records.

    Args:
        before: the recipe that the run has had so far.
        now: the one that it is to go on with.
        run_dir: of the run, for the message.

    Raises:
        ConfigError: a setting may not change; all of them are named, each with the reason.
    """
    old, new = dict(settings_of(before)), dict(settings_of(now))
    # A recipe with or without `demo` has other names; the data itself is compared.
    changed = [Change(name, old[name], new[name]) for name in old if name in new and old[name] != new[name]]
    refused = [(change, rule_of(change.setting).reason) for change in changed if _is_refused(change)]
    if refused:
        each = "; ".join(f"{change} (refused: {reason})" for change, reason in refused)
        flags = " ".join(f"--{change.setting.replace('_', '-')}" for change, _ in refused)
        raise ConfigError(
            f"expected the settings of the run in {run_dir}, found {each}; resume with the recipe and overrides that "
            f"it was started with ({flags}), or begin a new run in another --run-dir"
        )
    return [change for change in changed if rule_of(change.setting).verdict == "recorded"]


def record(run_dir: str, changes: Sequence[Change | str], step: int) -> list[str]:
    """Write changes into the run's events.

    Args:
        run_dir: the run's folder or gs:// place.
        changes: settings, or other changes in words.
        step: at which they take effect.

    Returns:
        Each in words, with its step.
    """
    lines = [f"{change} at step {step}" for change in changes]
    if lines:
        now = [Event(time.time(), SETTING, line) for line in lines]
        write_events(open_store(run_dir), [*read_events(run_dir), *now])
    return lines


def _is_refused(change: Change) -> bool:
    if change.setting in ("data.eval_images", "data.eval_labels"):
        return bool(change.before) != bool(change.now)
    return rule_of(change.setting).verdict == "refused"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
