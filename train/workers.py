"""Batch inference through Ray Data: workers that each hold one model, and how many of them there are."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from ingest import mistakes
from ingest.decode import IMAGE_DTYPE, read_array
from ingest.errors import ConfigError, DecodeError
from ingest.geometry import Affine, nifti_bytes, original
from ingest.pipeline import DataConfig, views
from ingest.stores import StoreConfig, open_store
from ingest.unwrap import own_error

from .derive import cpu_shares
from .evaluate import Shape, SlidingWindowConfig, sliding_window_logits
from .memory_killed import inference_out_of_memory
from .ray_noise import without_actor_warning
from .unet3d import total_stride
from .validate import score_rows
from .weights import Trained


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkersConfig:
    """How many processes infer, and over which windows."""

    workers: int = 1
    """Processes that each hold a model; one a GPU where there are GPUs."""

    cpus_per_worker: float | None = None
    """CPUs that Ray reserves for each; what is left over reads. None takes one, or less where the cluster has too
    few."""

    torch_threads: int | None = None
    """Compute threads of each; None takes as many as a rank of the training run had."""

    use_gpu: bool | None = None
    """Whether each takes a GPU; None takes one where the cluster has any, and there must then be enough."""

    task_cpus: float | None = None
    """CPUs that Ray reserves for one read task; None takes one, or less where the cluster has too few."""

    roi: Shape | None = None
    """Window (D, H, W) in voxels; None takes the training run's."""

    overlap: float | None = None
    """Share of a window that the next one covers again; None takes the training run's."""

    window_batch: int | None = None
    """Windows through the network at once; None takes the training run's."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers must be 1 or more; got {self.workers}")
        if any(cpus is not None and cpus <= 0 for cpus in (self.cpus_per_worker, self.task_cpus)):
            raise ConfigError(
                f"cpus_per_worker and task_cpus must be above 0; got {self.cpus_per_worker} and {self.task_cpus}"
            )
        if self.torch_threads is not None and self.torch_threads < 1:
            raise ConfigError(f"torch_threads must be 1 or more; got {self.torch_threads}")

    def window(self, trained: Trained) -> SlidingWindowConfig:
        """The training run's windows, with what is given here.

        Raises:
            ConfigError: they cannot work.
        """
        given = {name: getattr(self, name) for name in ("roi", "overlap", "window_batch")}
        window = dataclasses.replace(
            trained.recipe.window, **{name: value for name, value in given.items() if value is not None}
        )
        stride = total_stride(trained.recipe.model)
        if any(length % stride for length in window.shape):
            wider = " ".join(str(-(-length // stride) * stride) for length in window.shape)
            raise ConfigError(
                f"expected a window (D, H, W) of multiples of {stride} voxels, as the network of {trained.uri} halves "
                f"it, found --roi {' '.join(map(str, window.shape))}; give --roi {wider}: volumes are padded up to it"
            )
        return window

    def threads(self, trained: Trained) -> int:
        """Compute threads of a worker: a rank's own, so that sums round as they did when the run scored."""
        trainer = trained.recipe.trainer
        return self.torch_threads or trainer.torch_threads or max(1, int(trainer.rank_cpus))

    def cpus(self) -> tuple[float, float]:
        """CPUs of a worker and of a read task, on the cluster that Ray is connected to."""
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return cpu_shares(resources.get("CPU", 0.0), self.workers, self.cpus_per_worker, self.task_cpus)


class Worker:
    """One process's model; made by Ray Data, once a process.

    Calls are generators: what a plain function raises Ray Data replaces by an error of its own, without the cause.
    """

    def __init__(self, trained: Any, window: SlidingWindowConfig, threads: int, *, use_gpu: bool) -> None:
        """Build the model.

        Args:
            trained: reference to a `Trained` in Ray's object store.
            window: how a volume is covered.
            threads: for compute on CPUs.
            use_gpu: whether the model goes to the GPU.
        """
        self.device = torch.device("cuda" if use_gpu else "cpu")
        if not use_gpu:
            torch.set_num_threads(threads)
        self.trained: Trained = ray.get(trained)
        self.network = self.trained.network(self.device)
        self.window = window


class Scorer(Worker):
    """Raw labelled cases in, their Dice out."""

    def __init__(self, *model: Any, data: DataConfig, **options: Any) -> None:
        """As `Worker`, and how cases are decoded."""
        super().__init__(*model, **options)
        self.data = data

    def __call__(self, raw: pa.Table) -> Iterator[pa.Table]:
        """Score one table of `fetch.RAW_SCHEMA`: `index`, `case_id`, and `dice` and `present`, lists by class."""
        scored = list(score_rows(self.network, [raw], self.data, self.window, self.device))
        columns = {name: [getattr(score, name) for score in scored] for name in ("index", "case_id", "dice", "present")}
        yield pa.table(columns)


class Predictor(Worker):
    """Raw images in, label maps into a store, their names out."""

    def __init__(
        self, *model: Any, output: str, store: StoreConfig, names: str, affines: dict[str, Affine], **options: Any
    ) -> None:
        """As `Worker`, and where label maps go.

        Args:
            *model: of `Worker`.
            output: URI of the place.
            store: how it is opened.
            names: of the `.npy` files, with `{}` for the case id.
            affines: of the cases that are also written as NIfTI, by id.
            **options: of `Worker`.
        """
        super().__init__(*model, **options)
        self.output, self.names, self.affines = open_store(output, store), names, affines

    def __call__(self, raw: pa.Table) -> Iterator[pa.Table]:
        """Predict one table of `images.IMAGE_SCHEMA`: `case_id`, and `written`, a list of names."""
        written = []
        for case_id, name, body in zip(
            raw["case_id"].to_pylist(), raw["image_name"].to_pylist(), views(raw["image_npy"]), strict=True
        ):
            label_1DHW = self.predict(body, name)
            files = {self.names.format(case_id): _npy(label_1DHW)}
            affine = self.affines.get(original(case_id))
            if affine is not None:
                files[f"{case_id}.nii.gz"] = nifti_bytes(label_1DHW[0], affine)
            for file, data in files.items():
                self.output.put(file, data)
            written.append(list(files))
        yield pa.table({"case_id": raw["case_id"], "written": pa.array(written, pa.list_(pa.string()))})

    def predict(self, body: memoryview, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The label map (1, D, H, W) uint8 of one image's bytes.

        Raises:
            DecodeError: they are no image for this network.
        """
        image_CDHW = read_array(body, name, IMAGE_DTYPE)
        check_image(image_CDHW, self.trained.recipe.model.channels, name)
        image = torch.from_numpy(image_CDHW.copy()).to(self.device)
        logits_KDHW = sliding_window_logits(self.network, image, self.window)
        return logits_KDHW.argmax(dim=0, keepdim=True).to(torch.uint8).cpu().numpy()


def check_image(image_CDHW: np.ndarray[Any, np.dtype[np.float32]], channels: int, name: str) -> None:
    """Refuse an image that no network of so many channels can take.

    Raises:
        DecodeError: it has other channels, or voxels that are not finite.
    """
    if image_CDHW.shape[0] != channels:
        last = mistakes.channels_last(image_CDHW.shape, channels) == channels
        raise DecodeError(
            f"{name}: expected {channels} image channels, as the network was trained on, found "
            f"{image_CDHW.shape[0]} channels in shape {image_CDHW.shape}; "
            + (f"{mistakes.channels_last_advice(image_CDHW.shape, 'image')}; if not, " if last else "")
            + "give other images or another --checkpoint",
            "shape-mismatch",
        )
    if not np.isfinite(image_CDHW).all():
        raise DecodeError(
            f"{name}: expected finite voxels, found NaN or infinite ones; {mistakes.NOT_FINITE}", "non-finite"
        )


def infer(
    dataset: ray.data.Dataset, worker: Callable[..., Any], config: WorkersConfig, trained: Trained, **options: Any
) -> list[dict[str, Any]]:
    """Put raw volumes through workers, streaming, and collect their small answers.

    Args:
        dataset: raw volumes.
        worker: a `Worker` class.
        config: how many.
        trained: the network.
        **options: the class's own.

    Returns:
        Rows as the class gives them, in any order.

    Raises:
        ConfigError: the cluster has no room for the workers.
        IngestError: as it was raised in a worker.
    """
    worker_cpus, task_cpus = config.cpus()
    use_gpu = check_room(config, worker_cpus, task_cpus)
    arguments = {"use_gpu": use_gpu, **options}
    answers = dataset.map_batches(
        worker,
        fn_constructor_args=(ray.put(trained), config.window(trained), config.threads(trained)),
        fn_constructor_kwargs=arguments,
        batch_size=1,  # of a number, so that Ray does not fuse it with the read: workers infer while tasks read
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.workers),
        num_cpus=worker_cpus,
        num_gpus=1 if use_gpu else 0,
    )
    try:
        with without_actor_warning():
            return list(answers.iter_rows())
    except Exception as error:
        ours = own_error(error) or inference_out_of_memory(error)
        if ours is not None:
            raise ours from error
        raise


def check_room(config: WorkersConfig, worker_cpus: float, task_cpus: float) -> bool:
    """Whether each worker takes a GPU; that there is room for all of them, and for reading, is checked.

    Raises:
        ConfigError: there is not: Ray Data would wait for half an hour without a word.
    """
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    wanted = config.workers * worker_cpus + task_cpus
    if wanted > cpus + 1e-6:
        raise ConfigError(
            f"expected {wanted:g} CPUs, {worker_cpus:g} for each of {config.workers} workers and "
            f"{task_cpus:g} to read with, found {cpus:g} in the cluster; lower --workers, --cpus-per-worker or "
            "--task-cpus"
        )
    use_gpu = gpus > 0 if config.use_gpu is None else config.use_gpu
    if use_gpu and gpus < config.workers:
        raise ConfigError(
            f"expected a GPU for each of {config.workers} workers, found {gpus:g} in the cluster; lower --workers, "
            "wait until GPU nodes have joined, or give --use-gpu False to infer on CPUs"
        )
    return use_gpu


def _npy(label_1DHW: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    sink = io.BytesIO()
    np.save(sink, label_1DHW, allow_pickle=False)
    return sink.getvalue()
