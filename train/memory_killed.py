"""Says which process Ray's memory monitor killed, in a sentence: Ray's own message has a hundred lines."""

from __future__ import annotations

import re
from typing import NamedTuple

from ingest.errors import IngestError
from ingest.unwrap import wrapped

KILLED = "killed due to the node running low on memory"
"""Ray's words, in errors that crossed processes as text too."""

_RANK = (
    "a smaller --trainer.batch-size (with --trainer.accumulate for the same steps), a smaller "
    "--trainer.prefetch-batches, or fewer --trainer.num-workers"
)
_DATA = (
    "a larger --data.task-cpus (fewer data workers at once), a smaller --data.blocks-in-flight, a smaller "
    "--data.shards.shard-bytes, or a smaller --trainer.prefetch-batches"
)


class Killed(NamedTuple):
    """What Ray says of a worker that it killed for its memory.

    Attributes:
        who: the process in words, e.g. `a rank`, with its pid and its memory where Ray tells.
        node: how full the node was; empty where Ray does not tell.
        settings: that lower the use of such a process.
    """

    who: str
    node: str
    settings: str

    @property
    def words(self) -> str:
        """One line, without advice."""
        return f"Ray's memory monitor killed {self.who}{f', {self.node}' if self.node else ''}"


def killed_for_memory(error: BaseException) -> Killed | None:
    """What was killed for its memory, among an error and its causes; None where nothing was."""
    for each in wrapped(error):
        inner = getattr(each, "health_check_failure", each)
        text = str(inner)
        if KILLED in text and not isinstance(inner, IngestError):
            return parsed(text)
    return None


def parsed(text: str) -> Killed:
    """Parse Ray's message. A fact that the message lacks is left out."""
    chosen = re.search(r"Selected to kill: \((.*)\)", text)
    facts = dict(re.findall(r"(task name|pid|actual memory used)=([^,]+)", chosen[1] if chosen else ""))
    name = facts.get("task name", "")
    rank = name.startswith("RayTrainWorker")
    who = "a rank" if rank else f"a data worker ({name})" if name.startswith(("Read", "Map")) else name or "a worker"
    known = [f"pid {facts['pid']}"] if "pid" in facts else []
    known += [f"which had {_spaced(facts['actual memory used'])}"] if "actual memory used" in facts else []
    node = re.search(r"Memory on the node \(IP: ([^,)]+).*?was (\S+) used / (\S+) limit", text)
    allowed = re.search(r"exceeded threshold of \S+ \(([\d.]+%)", text)
    full = ""
    if node is not None:
        full = f"when {_spaced(node[2])} of the {_spaced(node[3])} of node {node[1]} were in use"
        full += f", and {allowed[1]} may be" if allowed is not None else ""
    return Killed(", ".join([who, *known]), full, _RANK if rank else _DATA)


def _spaced(size: str) -> str:
    return re.sub(r"(?<=\d)(?=[A-Z])", " ", size)


def out_of_memory(error: BaseException, run_dir: str) -> IngestError | None:
    """What to end a run with that lost a process to Ray's memory monitor; None where it failed otherwise.

    Args:
        error: that `fit` raised.
        run_dir: the run's folder, to go on with.
    """
    killed = killed_for_memory(error)
    if killed is None:
        return None
    return IngestError(
        f"expected memory for the processes of the run, found that {killed.words}; go on with --trainer.resume "
        f"{run_dir} and {killed.settings}, on a node with more memory, or without other processes on it (Ray's "
        "raylet.out lists the largest)"
    )


def inference_out_of_memory(error: BaseException) -> IngestError | None:
    """Return the error of an `evaluate` or `predict` that lost a process to Ray's memory monitor; None otherwise."""
    killed = killed_for_memory(error)
    if killed is None:
        return None
    return IngestError(
        f"expected memory for the processes that read and infer, found that {killed.words}; give fewer --workers, a "
        "smaller --window-batch, or a larger --task-cpus (fewer reads at once), or use a node with more memory (Ray's "
        "raylet.out lists its largest processes)"
    )
