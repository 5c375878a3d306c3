"""One actor a run that everyone tells what they did: it sets the metrics, keeps the record, and answers who follows.

Data workers tell of their work about once a second and at each task's end, ranks of their steps about once a second,
and the run's controller of each epoch. Nobody waits for it, and a run goes on without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ingest.actors import started_again
from ingest.errors import IngestError
from ingest.ray_compat import own_ray_ended
from ingest.stores import open_store
from ingest.tally import Work

from .gauges import Gauges
from .lease import LEASE_STORE, require_held
from .plain_json import is_figure
from .records import Event, StepRecord, read_events, write_events, write_steps
from .waits import Blocked, EpochWork, by_cause

if TYPE_CHECKING:
    from .boards import TensorBoard

logger = logging.getLogger(__name__)

ANSWER_S = 10.0  # longest wait for an answer of the monitor
LOOK_S = 0.5  # between two looks whether there is a Ray that could answer
TOLD = ("start", "fault", "warning")  # kinds of events that those who follow a run are told of as they happen
RETRIES_TOGETHER_S = 10.0  # retries within this are one event


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pulse:
    """What a rank tells of its steps since its last pulse.

    Attributes:
        started_unix_s: when the rank began the epoch.
        steps_of_epoch: done by now.
        first_batch_s: for which it waited for its first batch; None while it still does.
        waited_s: for data, since the last pulse; `blocked` is Ray's account of the same.
        records: of rank 0 only.
        samples: trained on since the last pulse.
        samples_per_s: of this rank in this epoch so far.
    """

    rank: int
    ranks: int
    epoch: int
    step: int
    steps_of_epoch: int
    steps_per_epoch: int
    started_unix_s: float
    first_batch_s: float | None
    waited_s: float
    blocked: Blocked
    records: Sequence[StepRecord]
    samples: int
    samples_per_s: float | None
    au: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, for those who follow it; None is what is not known yet."""

    epoch: int | None = None
    step: int | None = None
    steps_per_epoch: int | None = None
    steps_of_epoch: int = 0
    loss: float | None = None
    mean_dice: float | None = None
    samples_per_s: float | None = None
    au: float | None = None
    quarantined: int = 0


class Mark(NamedTuple):
    """How far somebody has followed what a run's monitor tells.

    Attributes:
        life: of the monitor's process: one that was started again counts anew.
        number: of events so far.
    """

    life: str
    number: int


class RunMonitor:
    """The monitor itself; an actor where `start_monitor` makes it. Its calls come one after the other."""

    def __init__(
        self, run_dir: str, *, tensorboard: bool = False, gauges: Any = None, holder: str | None = None
    ) -> None:
        """Take up what is kept of an earlier start.

        Args:
            run_dir: the run's folder or gs:// place.
            tensorboard: whether to write TensorBoard logs too.
            gauges: in the place of Ray's metrics, where there is no Ray.
            holder: the id of the run's lease: events are not written while the lease is another's, since they would
                replace those of that run. None writes them in any case.
        """
        self._store, self._run_dir, self._holder = open_store(run_dir), run_dir, holder
        self._gauges = Gauges(run_dir.rstrip("/").rpartition("/")[2]) if gauges is None else gauges
        self._board = self._make_board() if tensorboard else None
        self._events = read_events(run_dir)
        self._life = uuid.uuid4().hex
        self._told: list[Event] = []
        self._start = ""
        self._work: dict[int, EpochWork] = {}
        self._retries: dict[int, dict[str, int]] = {}
        self._records: list[StepRecord] = []
        self._pulses: dict[int, Pulse] = {}
        self._unexplained: dict[int, Pulse] = {}
        self._progress = Progress()
        if started_again():
            self.event(
                "warning",
                "the run's monitor died and was started again; its metrics count what it is told from now on",
            )

    def _make_board(self) -> TensorBoard:
        from .boards import TensorBoard  # data workers load this module too, and have no use for it

        return TensorBoard(self._store)

    def begin(self, start: str, ranks: int, epoch: int, step: int, checkpoint: str | None) -> None:
        """The ranks start, for the first time or again."""
        self._keep_steps()
        self._start = start
        self._pulses, self._unexplained = {}, {}
        # What the start before has read beyond this epoch is read anew.
        self._work = {of: work for of, work in self._work.items() if of <= epoch}
        self._retries = {of: counts for of, counts in self._retries.items() if of <= epoch}
        self._gauges.count("voxflux_starts", 1)
        who = "1 rank begins" if ranks == 1 else f"{ranks} ranks begin"
        at = f"{who} epoch {epoch + 1} at step {step}"
        self.event("start", f"{at}, from {checkpoint}" if checkpoint else at)

    def work(self, work: Work) -> None:
        """A data worker has done something."""
        known = self._work.get(work.epoch, EpochWork())
        firsts = [time_s for time_s in (known.first_task_unix_s, work.started_unix_s) if time_s is not None]
        self._work[work.epoch] = EpochWork(
            fetch_s=known.fetch_s + work.fetch_s,
            transform_s=known.transform_s + work.transform_s,
            first_task_unix_s=min(firsts),
        )
        gauges = self._gauges
        gauges.count("voxflux_samples", work.samples)
        gauges.count("voxflux_bytes", work.bytes_read)
        gauges.count("voxflux_fetch_seconds", work.fetch_s)
        gauges.count("voxflux_transform_seconds", work.transform_s)
        gauges.count("voxflux_composites", work.composites)
        for kind, number in work.retries.items():
            gauges.count("voxflux_retries", number, kind)
            of_epoch = self._retries.setdefault(work.epoch, {})
            of_epoch[kind] = of_epoch.get(kind, 0) + number
        if work.retries:
            self._note_retries(work.retries)

    def pulse(self, pulse: Pulse) -> None:
        """A rank has made steps."""
        gauges = self._gauges
        gauges.count("voxflux_trained_samples", pulse.samples)
        self._count_stall(pulse)
        if pulse.records:
            if self._records and self._records[-1].epoch != pulse.epoch:
                self._keep_steps()
            self._records.extend(pulse.records)
            gauges.set("voxflux_loss", pulse.records[-1].loss)
            gauges.set("voxflux_learning_rate", pulse.records[-1].learning_rate)
        self._pulses[pulse.rank] = pulse
        if pulse.rank != 0:
            return
        ranks = [other for other in self._pulses.values() if other.epoch == pulse.epoch]
        gauges.set("voxflux_epoch", pulse.epoch + 1)
        gauges.set("voxflux_step", pulse.step)
        rate = sum(other.samples_per_s or 0.0 for other in ranks)
        known = [other.au for other in ranks if other.au is not None]
        au = sum(known) / len(known) if known else None
        gauges.set("voxflux_samples_per_second", rate)
        gauges.set("voxflux_au", au)
        self._progress = dataclasses.replace(
            self._progress,
            epoch=pulse.epoch,
            step=pulse.step,
            steps_per_epoch=pulse.steps_per_epoch,
            steps_of_epoch=pulse.steps_of_epoch,
            loss=self._records[-1].loss if self._records else None,
            samples_per_s=rate,
            au=au,
        )

    def epoch_done(self, row: Mapping[str, Any]) -> None:
        """The epoch's row is written."""
        gauges = self._gauges
        gauges.set("voxflux_au", row.get("au"))
        gauges.set("voxflux_samples_per_second", row.get("samples_per_s"))
        gauges.set("voxflux_dice", row.get("mean_dice"), "mean")
        for number, dice in enumerate(row.get("dice_by_class") or [], 1):
            gauges.set("voxflux_dice", dice, str(number))
        gauges.count("voxflux_stall_seconds", (row.get("stall_by_cause_s") or {}).get("listing", 0.0), "listing")
        self.quarantined(int(row.get("quarantined") or 0))
        if is_figure(row.get("mean_dice")):
            self._progress = dataclasses.replace(self._progress, mean_dice=row["mean_dice"])
        self._keep_steps()
        self._keep_events()
        if self._board is not None:
            self._board.row(row)
            with self._warned("TensorBoard's logs"):
                self._board.keep()

    def quarantined(self, cases: int) -> None:
        """So many cases are in quarantine."""
        if cases > self._progress.quarantined:
            self.event("quarantine", f"{cases} cases in quarantine")
        self._progress = dataclasses.replace(self._progress, quarantined=cases)
        self._gauges.set("voxflux_quarantined", cases)

    def event(self, kind: str, text: str) -> None:
        """Something befell the run."""
        event = Event(time.time(), kind, text)
        self._events.append(event)
        if kind in TOLD:
            self._told.append(event)
        self._keep_events()

    def told_since(self, mark: Mark | None) -> tuple[Mark, list[Event]]:
        """What there is to tell those who follow the run: its starts, faults and warnings, each once.

        Args:
            mark: of the answer before; None gives all that this process was told of.

        Returns:
            The mark for the next call, and the events since the last one.
        """
        seen = mark.number if mark is not None and mark.life == self._life else 0
        return Mark(self._life, len(self._told)), self._told[seen:]

    def work_of(self, epoch: int) -> EpochWork:
        """What the data workers have done in an epoch so far."""
        return self._work.get(epoch, EpochWork())

    def retries_of(self, epoch: int) -> dict[str, int]:
        """Retries of the data workers in an epoch so far, by kind."""
        return dict(self._retries.get(epoch, {}))

    def progress(self) -> Progress:
        """Where the run stands."""
        return self._progress

    def close(self, kind: str, text: str) -> None:
        """The run ends; when this returns, all is kept."""
        self._keep_steps()
        self.event(kind, text)
        if self._board is not None:
            with self._warned("TensorBoard's logs"):
                self._board.close()
            self._board = None

    def _count_stall(self, pulse: Pulse) -> None:
        """Count the wait by cause; what the data workers have not told of yet is counted with the next pulse."""
        held = self._unexplained.pop(pulse.rank, None)
        waited_s, blocked, starting_s = pulse.waited_s, pulse.blocked, 0.0
        first = pulse.rank not in self._pulses or self._pulses[pulse.rank].epoch != pulse.epoch
        if held is not None and held.epoch == pulse.epoch:
            waited_s += held.waited_s
            blocked = Blocked(
                **{part: seconds + getattr(held.blocked, part) for part, seconds in dataclasses.asdict(blocked).items()}
            )
            first = True
        work = self._work.get(pulse.epoch)
        if work is None or work.first_task_unix_s is None:
            self._unexplained[pulse.rank] = dataclasses.replace(pulse, waited_s=waited_s, blocked=blocked)
            return
        if first:
            starting_s = min(work.first_task_unix_s - pulse.started_unix_s, pulse.first_batch_s or 0.0)
        for cause, seconds in by_cause(waited_s, blocked, work, starting_s).items():
            self._gauges.count("voxflux_stall_seconds", seconds / pulse.ranks, cause)

    def _note_retries(self, retries: Mapping[str, int]) -> None:
        words = ", ".join(f"{number} {kind}" for kind, number in sorted(retries.items()))
        last = self._events[-1] if self._events else None
        if last is not None and last.kind == "retry" and time.time() - last.at_unix_s < RETRIES_TOGETHER_S:
            if len(last.text) < 200:
                self._events[-1] = Event(last.at_unix_s, "retry", f"{last.text}, {words}")
            return
        self._events.append(Event(time.time(), "retry", words))

    def _keep_steps(self) -> None:
        if self._records:
            with self._warned("records of steps, kept to be written with the next"):
                write_steps(self._store, self._start or "0", self._records)
                if self._board is not None:
                    self._board.steps(self._records)
                self._records = []

    def _keep_events(self) -> None:
        with self._warned("events, kept to be written with the next"):
            if self._holder is not None:
                require_held(open_store(self._run_dir, LEASE_STORE), self._holder)
            write_events(self._store, self._events)

    @contextlib.contextmanager
    def _warned(self, what: str) -> Iterator[None]:
        """A record that cannot be written ends no run, but is logged, and told of once to those who follow the run."""
        try:
            yield
        except (IngestError, OSError) as error:
            words = f"could not write the run's {what}"
            logger.warning("%s: %s", words, error)
            if not any(event.text.startswith(words) for event in self._told):
                self._told.append(Event(time.time(), "warning", f"{words}: {error}"))


@dataclasses.dataclass(frozen=True)
class Monitor:
    """A run's monitor, from any process: pickles as plain values. Called with some `Work`, it passes it on.

    Attributes:
        name: of the actor.
        namespace: of Ray's, that it is in.
        keeper: what keeps the actor alive; None in copies.
    """

    name: str
    namespace: str
    keeper: Any = dataclasses.field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[Monitor], tuple[str, str]]:
        return Monitor, (self.name, self.namespace)

    def __call__(self, work: Work) -> None:
        """See `ingest.tally.Recorder`."""
        self.tell("work", work)

    def tell(self, method: str, *arguments: object) -> None:
        """Tell and go on; where there is no monitor any more, nobody is told."""
        if own_ray_ended():
            return
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            getattr(self._actor(), method).remote(*arguments)

    def warn(self, text: str) -> None:
        """Tell of something that the run survives, and that whoever follows it should know."""
        self.tell("event", "warning", text)

    def ask(self, method: str, *arguments: object) -> Any:
        """Its answer; None where none comes in good time, or Ray ends while it is waited for."""
        if own_ray_ended():
            return None
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            answer = getattr(self._actor(), method).remote(*arguments)
            deadline = time.monotonic() + ANSWER_S
            while time.monotonic() < deadline and not own_ray_ended():
                if ray.wait([answer], timeout=LOOK_S)[0]:
                    return ray.get(answer)
        return None

    def death(self) -> ray.exceptions.ActorDiedError | None:
        """Of what it died, where Ray does not start it again; None where it answers, or does not for now."""
        if own_ray_ended():
            return None
        try:
            ray.get(self._actor().progress.remote(), timeout=ANSWER_S)
        except ray.exceptions.ActorDiedError as error:
            return error
        except (ValueError, ray.exceptions.RayError):
            return None
        return None

    def _actor(self) -> Any:
        return self.keeper or _actor(self.name, self.namespace)


@functools.lru_cache(maxsize=4)
def _actor(name: str, namespace: str) -> Any:
    return ray.get_actor(name, namespace=namespace)


def start_monitor(run_dir: str, *, tensorboard: bool = False, holder: str | None = None) -> Monitor:
    """Start a run's monitor on this node, on no CPU; it ends with the handle that is returned. See `RunMonitor`."""
    context = ray.get_runtime_context()
    name = f"voxflux-monitor-{uuid.uuid4().hex[:12]}"
    keeper = (
        ray.remote(RunMonitor)
        .options(
            name=name,
            namespace=context.namespace,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,  # what it is told while it is started again reaches it
            scheduling_strategy=NodeAffinitySchedulingStrategy(context.get_node_id(), soft=True),
        )
        .remote(run_dir, tensorboard=tensorboard, holder=holder)
    )
    return Monitor(name, context.namespace, keeper)
