"""The complete configuration of a run: one tree of frozen dataclasses, saved with the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ingest.errors import ConfigError
from ingest.pipeline import DataConfig

from .evaluate import SlidingWindowConfig
from .optimizer import OptimizerConfig
from .unet3d import UNet3DConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """How many processes train, and for how long."""

    num_workers: int = 1
    """Training processes (ranks); one a GPU where there are GPUs."""

    cpus_per_worker: float | None = None
    """CPUs that Ray reserves for one training process; what is left over reads and transforms. None takes one, or less
    where the cluster has too few."""

    resources_per_worker: dict[str, float] | None = None
    """What one training process reserves beside its CPUs and its GPU: names and amounts of custom resources, as in Ray
    Train's ScalingConfig. It trains on nodes that have them."""

    use_gpu: bool | None = None
    """Whether each rank takes a GPU; None takes one where the cluster has any, and there must then be enough.
    With check_resources False, None is refused on a cluster without a GPU: more may come."""

    batch_size: int = 32
    """Samples that a rank puts through the network at once."""

    accumulate: int = 1
    """Batches of `batch_size` whose gradients make one step: 2 of 16 train as 1 of 32 does, in half the memory, but for
    batch norm, which normalises each by itself."""

    epochs: int = 100
    """Passes over the training cases."""

    evaluate_from: int = 0
    """The first epoch (from 0) after which held-out cases are scored."""

    evaluate_every: int = 1
    """Epochs from one scoring to the next; the last epoch is always scored. 0 never scores."""

    quality_threshold: float | None = None
    """Mean Dice of the held-out cases at which the run ends, with whole epochs; None trains all of `epochs`."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the forward pass: autocast to bf16, or to fp16 with a loss scale, or none; auto is bf16 on GPUs that have it
    (compute capability 8.0 or more), fp16 on other GPUs, and fp32 on CPUs."""

    compile: bool = False
    """Put the network through torch.compile: a slow first step, and faster ones after it on most GPUs."""

    compile_backend: Literal["inductor", "aot_eager"] = "inductor"
    """Of torch.compile. `aot_eager` captures the network and compiles nothing: it tells where a failure comes from."""

    torch_threads: int | None = None
    """Compute threads of a rank; None takes its whole CPUs, at least one."""

    prefetch_batches: int = 3
    """Batches made ready ahead of the step. Not many: a buffered batch keeps its whole block in memory."""

    max_failures: int = 0
    """Times that the run starts again from its last checkpoint after a failure; -1 for ever."""

    checkpoints_kept: int = 2
    """Checkpoints that stay in the run's folder, the newest ones: at least two, so that a crash while one is
    replaced leaves a whole one."""

    checkpoint_every_steps: int | None = None
    """Steps of an epoch from one checkpoint to the next; one is written after each epoch in any case."""

    max_workers: int | None = None
    """With it the run is elastic: from num_workers to max_workers ranks, as many as there is room for."""

    check_resources: bool = True
    """Refuse a run for which the cluster has no free CPUs or GPUs; without, it waits, as for a cluster that grows."""

    resume: str | None = None
    """The folder of a run to go on with, from its last checkpoint; also with another number of ranks."""

    ledger: str | None = None
    """Folder seen by all nodes, or gs:// place, that every rank records its steps in, for `voxflux audit`. A
    relative folder is taken from where the run is started."""

    tensorboard: bool = False
    """Write TensorBoard logs under RUN_DIR/tensorboard."""

    mlflow: str | None = None
    """Tracking URI of an MLflow server that the run is logged to, such as http://HOST:5000; None logs to none."""

    channels_last: bool = True
    """Keep channels innermost in memory: the same numbers but for rounding, and faster on CPUs and tensor cores. Not
    done on CPUs in half precision, where torch's gradients cannot be trusted in this layout."""

    deterministic: bool = False
    """Use deterministic algorithms only: a run repeated on the same machine ends in the same weights."""

    def __post_init__(self) -> None:
        if self.checkpoints_kept < 2:
            raise ConfigError(f"trainer.checkpoints_kept must be 2 or more; got {self.checkpoints_kept}")
        if self.checkpoint_every_steps is not None and self.checkpoint_every_steps < 1:
            raise ConfigError(f"trainer.checkpoint_every_steps must be 1 or more; got {self.checkpoint_every_steps}")
        if self.max_workers is not None and self.max_workers < self.num_workers:
            raise ConfigError(
                f"trainer.max_workers must be at least num_workers, {self.num_workers}; got {self.max_workers}"
            )
        for field in ("num_workers", "batch_size", "accumulate", "epochs", "prefetch_batches"):
            if getattr(self, field) < 1:
                raise ConfigError(f"trainer.{field} must be 1 or more; got {getattr(self, field)}")
        for field in ("evaluate_from", "evaluate_every"):
            if getattr(self, field) < 0:
                raise ConfigError(f"trainer.{field} must be 0 or more; got {getattr(self, field)}")
        if self.rank_cpus <= 0:
            raise ConfigError(f"trainer.cpus_per_worker must be above 0; got {self.cpus_per_worker}")
        if self.quality_threshold is not None and not 0 < self.quality_threshold <= 1:
            raise ConfigError(f"trainer.quality_threshold must be above 0 and at most 1; got {self.quality_threshold}")
        if self.quality_threshold is not None and self.evaluate_every == 0:
            raise ConfigError(
                f"trainer.quality_threshold {self.quality_threshold} needs scores, and evaluate_every is 0; raise that"
            )
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ConfigError(f"trainer.precision must be auto, fp32, bf16 or fp16; got {self.precision!r}")
        if self.compile_backend not in ("inductor", "aot_eager"):
            raise ConfigError(f"trainer.compile_backend must be inductor or aot_eager; got {self.compile_backend!r}")
        for name, amount in (self.resources_per_worker or {}).items():
            if name in ("CPU", "GPU") or amount <= 0:
                raise ConfigError(
                    "trainer.resources_per_worker must name custom resources with amounts above 0, CPU and GPU have "
                    f"options of their own; got {name}: {amount}"
                )
        if self.torch_threads is not None and self.torch_threads < 1:
            raise ConfigError(f"trainer.torch_threads must be 1 or more; got {self.torch_threads}")
        if self.mlflow is not None and not _is_tracking_uri(self.mlflow):
            # The message leaves out a login, because that may hold a password.
            raise ConfigError(
                "trainer.mlflow must be a tracking URI: http://HOST:PORT, https://HOST, databricks, or an absolute "
                f"sqlite:////FOLDER/mlflow.db; got {self.mlflow.rpartition('@')[2]!r}"
            )

    @property
    def rank_cpus(self) -> float:
        """`cpus_per_worker`, or 1, where no cluster is known."""
        return 1.0 if self.cpus_per_worker is None else self.cpus_per_worker

    @property
    def step_batch(self) -> int:
        """Samples of one rank in one optimiser step."""
        return self.batch_size * self.accumulate

    @property
    def least_step_cases(self) -> int:
        """Cases of one step over the fewest ranks that the run may have: what both the plan and the ranks go by."""
        return self.step_batch * self.num_workers

    def evaluates(self, epoch: int) -> bool:
        """Whether held-out cases are scored after this epoch."""
        if self.evaluate_every == 0:
            return False
        due = epoch >= self.evaluate_from and (epoch - self.evaluate_from) % self.evaluate_every == 0
        return due or epoch == self.epochs - 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """The data that a recipe makes for itself when no URIs are given: MNI152-derived cases on an embedded server."""

    cases: int = 264
    """Cases to make, held-out ones included."""

    shape: tuple[int, int, int] = (48, 48, 48)
    """(D, H, W) of each case, in voxels."""

    data_dir: str = "data/demo"
    """Folder that the cases are kept in, so that a second run need not make them."""

    def __post_init__(self) -> None:
        if self.cases < 2 or any(length < 8 for length in self.shape):
            raise ConfigError(
                f"demo data must be 2 cases or more of 8 voxels or more; got {self.cases} of {self.shape}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides what a run does."""

    run_dir: str | None = None
    """Where checkpoints, metrics and pictures go: a folder, or gs:// (needed on several nodes). None makes a folder
    under runs/."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: UNet3DConfig = dataclasses.field(default_factory=UNet3DConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    window: SlidingWindowConfig = dataclasses.field(default_factory=SlidingWindowConfig)
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    demo: DemoConfig | None = None

    def to_json(self) -> str:
        """The whole tree, for a person and for the record.

        Raises:
            ConfigError: a setting is NaN or infinite, which JSON cannot hold.
        """
        tree = dataclasses.asdict(self)
        try:
            return json.dumps(tree, indent=2, allow_nan=False)
        except ValueError as error:
            odd = [f"--{name} {value}" for name, value in flat_settings(tree) if "NaN" in value or "Infinity" in value]
            raise ConfigError(
                f"expected finite settings, found {', '.join(odd)}; give a number, a large one for no limit"
            ) from error


def flat_settings(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by the name of its flag, and its value as JSON.

    Args:
        tree: what `Recipe.to_json` wrote, or a part of it.
        before: put in front of the names.
    """
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat_settings(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", json.dumps(value, ensure_ascii=False)


def from_json(text: str | bytes) -> Recipe:
    """Read what `Recipe.to_json` wrote, as text or as UTF-8.

    Raises:
        ConfigError: it is not such a tree.
    """
    try:
        recipe: Recipe = _build(Recipe, json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"expected a saved recipe, found something else ({error}); check the file") from error
    return recipe


def _is_tracking_uri(uri: str) -> bool:
    """Whether it may be one of MLflow's, and means the same place wherever a job runs: no relative path."""
    scheme, separator, rest = uri.partition("://")
    absolute = {"sqlite": "//", "file": "/"}.get(scheme, "")
    return uri == "databricks" or (bool(scheme and separator and rest) and rest.startswith(absolute))


def _build(kind: Any, values: Any) -> Any:
    """Build a dataclass from plain values, going down where the default is a dataclass, and back to tuples."""
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is no tree of settings but {type(values).__name__}")
    unknown = values.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise KeyError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    built: dict[str, Any] = {}
    nested = {"demo": DemoConfig}
    for field in dataclasses.fields(kind):
        if field.name not in values:
            continue
        value = values[field.name]
        default = field.default_factory() if callable(field.default_factory) else None
        if dataclasses.is_dataclass(default) or (field.name in nested and value is not None):
            built[field.name] = _build(nested.get(field.name) or type(default), value)
        else:
            built[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)
