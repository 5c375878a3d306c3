"""A run on an MLflow tracking server: its settings, a row an epoch, and how it ended, by MLflow's own client.

MLflow is an optional extra. The run's driver writes, from the thread that follows metrics.json, so that neither the
ranks nor the data workers ever wait for a server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ingest.errors import ConfigError
from ingest.stores import open_store

from .config import Recipe, flat_settings
from .metrics import Row
from .passwords import hidden, usable_uri, without_password
from .plain_json import to_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from .stop import Stopped

TRACKING_FILE = "mlflow.json"
EXPERIMENT = "voxflux"  # where MLFLOW_EXPERIMENT_NAME names no other
OF_EPOCH = "train_loss"  # every row has it: it tells which epochs the server has
# Unless the user says otherwise: MLflow tries a server that is not there for minutes, tells its makers of its use, and
# prints where the run is, as we do.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# The most that MLflow takes in one call, and of one value.
MOST_AT_ONCE = 100
LONGEST_PARAM, LONGEST_TAG = 6000, 5000
AGAIN_AFTER_S = 30.0  # a server that did not take an epoch is left alone for so long


class MlflowRun:
    """One run on a server; not thread-safe."""

    def __init__(self, client: MlflowClient, run_id: str, console: Console, logged: set[int] | None = None) -> None:
        """Take up a run.

        Args:
            client: of the server that has it.
            run_id: its id there.
            console: is told of what could not be logged.
            logged: epochs, from 1, that the server has already.
        """
        self.client, self.run_id = client, run_id
        self._console = console
        self._logged = set(logged or ())
        self._failed_s: float | None = None  # when it was, on the monotonic clock

    def rows(self, rows: Sequence[Row], *, now: bool = False) -> None:
        """Log the epochs that the server does not have yet; what it does not take is tried again at a later call.

        Args:
            rows: of metrics.json.
            now: whether to try also where it has just failed.
        """
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        if self._failed_s is not None and time.monotonic() - self._failed_s < AGAIN_AFTER_S and not now:
            return
        for row in rows:
            epoch = int(row["epoch"]) + 1
            if epoch in self._logged:
                continue
            now_ms = int(time.time() * 1000)
            metrics = [Metric(name, value, now_ms, epoch) for name, value in metrics_of(row).items()]
            try:
                self.client.log_batch(self.run_id, metrics=metrics)
            except (MlflowException, OSError) as error:
                if self._failed_s is None or now:  # once for all that fail in a row, and at the end
                    again = "" if now else ", which is tried again"
                    self._say(f"could not log epoch {epoch} to MLflow{again}: {_words(error)}")
                self._failed_s = time.monotonic()
                return
            self._failed_s = None
            self._logged.add(epoch)

    def end(self, status: str) -> None:
        """Say how the run ended: FINISHED, KILLED or FAILED."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.set_terminated(self.run_id, status)
        except (MlflowException, OSError) as error:
            self._say(f"could not tell MLflow that run {self.run_id} is {status}: {_words(error)}")

    def _say(self, words: str) -> None:
        self._console.print(words, markup=False, highlight=False)


@dataclasses.dataclass(frozen=True)
class Tracking:
    """A server that has answered, and the run there that is to be gone on with.

    Attributes:
        client: of the server.
        uri: of the server, without a password.
        run_id: None where a new run is to be made.
    """

    client: MlflowClient
    uri: str
    run_id: str | None = None


def reach(uri: str | None, run_dir: str, *, resumed: bool) -> Tracking | None:
    """Find the server, and the run of a folder that is gone on with, before anything starts; None where none is asked.

    Args:
        uri: MLflow's tracking URI, with its password where it has one.
        run_dir: the run's folder or gs:// place.
        resumed: whether the run goes on from an earlier one there.

    Raises:
        ConfigError: MLflow is not installed, the server does not answer or refuses us, or does not have the run.
    """
    if uri is None:
        return None
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    whole, uri = uri, without_password(uri)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise ConfigError(
            f"expected MLflow's client, for --trainer.mlflow {uri}, found none ({error}); install it where the run is "
            "started, by `pip install -c constraints.txt -e '.[mlflow]'`, or leave the option out"
        ) from error
    try:
        client = MlflowClient(tracking_uri=usable_uri(whole))
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"expected an MLflow tracking server at {uri}, found: {hidden(_words(error), whole)}; start it, or check "
            "--trainer.mlflow and, where it asks for them, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN"
        ) from error
    saved = read_tracking(run_dir) if resumed else None
    if saved is None:
        return Tracking(client, uri)
    try:
        client.get_run(saved["run_id"])
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"expected run {saved['run_id']} of {run_dir} at {uri}, found: {hidden(_words(error), whole)}; give the "
            f"--trainer.mlflow that the run began with, {without_password(saved['uri'])}, or move {TRACKING_FILE} out "
            "of its folder to begin another there"
        ) from error
    return Tracking(client, uri, saved["run_id"])


@contextlib.contextmanager
def tracked(
    tracking: Tracking | None, recipe: Recipe, run_dir: str, console: Console, stopped: Stopped
) -> Iterator[MlflowRun | None]:
    """Begin the run on the server or go on with it there, and say there how it ended.

    Args:
        tracking: from `reach`; None yields None.
        recipe: resolved.
        run_dir: the run's folder or gs:// place.
        console: is told of the run.
        stopped: whether a signal ended it.

    Raises:
        ConfigError: the server, which answered before, does not take the run.
    """
    if tracking is None:
        yield None
        return
    from mlflow.exceptions import MlflowException

    try:
        run = begin(tracking, recipe, run_dir, console)
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"expected {tracking.uri} to take a run, found: {_words(error)}; check the server and its permissions"
        ) from error
    try:
        yield run
    except Exception:
        run.end("FAILED")
        raise
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    run.end("FINISHED" if stopped.signal_number is None else "KILLED")


def begin(tracking: Tracking, recipe: Recipe, run_dir: str, console: Console) -> MlflowRun:
    """Make the run, or take up the one that is gone on with, and log its settings."""
    client, name = tracking.client, run_dir.rstrip("/").rpartition("/")[2]
    settings = dict(flat_settings(dataclasses.asdict(recipe)))
    logged: set[int] = set()
    if tracking.run_id is None:
        experiment_id = _experiment(client, os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT)
        note = f"Run folder: `{run_dir}`. It holds the checkpoints, metrics.json and the run's page, report.html."
        tags = {"run_dir": run_dir, "mlflow.note.content": note, "mlflow.source.name": "voxflux"}
        run = client.create_run(experiment_id, tags=tags, run_name=name)
        kept = {"run_id": run.info.run_id, "experiment_id": experiment_id, "uri": tracking.uri}
        open_store(run_dir).put(TRACKING_FILE, to_json(kept).encode())
    else:
        run = client.get_run(tracking.run_id)
        client.update_run(tracking.run_id, status="RUNNING")
        logged = {metric.step for metric in client.get_metric_history(tracking.run_id, OF_EPOCH)}
    run_id, experiment_id = run.info.run_id, run.info.experiment_id
    _log_settings(client, run_id, settings, before=run.data.params)
    words = f"run {run_id} of experiment {experiment_id} at {tracking.uri}"
    if tracking.uri.startswith("http"):
        words = f"{tracking.uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    console.print(f"MLflow: {words}", markup=False, highlight=False)
    return MlflowRun(client, run_id, console, logged)


def _experiment(client: MlflowClient, name: str) -> str:
    """The id of an experiment, made where there is none; two runs may begin at the same time."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _log_settings(client: MlflowClient, run_id: str, settings: Mapping[str, str], before: Mapping[str, str]) -> None:
    """Settings as MLflow's params; those that changed since the run began, which a param cannot, as tags."""
    from mlflow.entities import Param, RunTag

    cut = {name: value[:LONGEST_PARAM] for name, value in settings.items()}
    params = [Param(name, value) for name, value in cut.items() if name not in before]
    tags = [RunTag(name, value[:LONGEST_TAG]) for name, value in cut.items() if before.get(name, value) != value]
    for first in range(0, max(len(params), len(tags)), MOST_AT_ONCE):
        part = slice(first, first + MOST_AT_ONCE)
        client.log_batch(run_id, params=params[part])
        client.log_batch(run_id, tags=tags[part])


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch's row by their names there; what a number is not, or not finite, is left out."""
    values: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping | list):
            parts = value.items() if isinstance(value, Mapping) else enumerate(value, 1)
            # No name may be the beginning of another's path: a store of files has folders for paths.
            values |= {f"{name}/{part}": number for part, number in parts}
        else:
            values[name] = value
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value) and name != "epoch"  # it is the step
    }


def read_tracking(run_dir: str) -> dict[str, str] | None:
    """What RUN_DIR/mlflow.json says; None of a run that was not tracked.

    Raises:
        ConfigError: it is not what `begin` writes.
    """
    store = open_store(run_dir)
    for entry in store.list(TRACKING_FILE):
        if entry.name == TRACKING_FILE:
            try:
                saved = json.loads(store.fetch([entry])[0])
                return {name: str(saved[name]) for name in ("run_id", "experiment_id", "uri")}
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(
                    f"expected an MLflow run in {run_dir}/{TRACKING_FILE}, found something else ({error}); move it "
                    "away to begin another run there"
                ) from error
    return None


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
