"""CPU time and memory of this process and all below it, by /proc: Ray's workers come and go meanwhile."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from pathlib import Path
from types import TracebackType

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LOOK_EVERY_S = 0.5
ProcessKey = tuple[int, int]  # pid and start time: a pid alone may be given again

ROLES = ("own", "readers", "coordinator", "raylet", "services")
"""What a process of a Ray that reads is: this one, which consumes; the workers of read tasks; the actors that run Ray
Data's executions and keep its statistics; the raylet with its object store; and what Ray has beside them (GCS,
dashboard, agents, monitors)."""


class TreeMeter:
    """CPU seconds of a process tree while the context is entered; processes that end meanwhile are counted too.

    Thread-safe. What a process used after the last look, half a second at most, is lost if it ends unseen.
    """

    def __init__(self, root: int | None = None, leave_out: tuple[int, ...] = ()) -> None:
        """Note the tree.

        Args:
            root: process id; None is this process.
            leave_out: process ids whose part of the tree does not count, such as a server's.
        """
        self._root = root or os.getpid()
        self._leave_out = frozenset(leave_out)
        self._lock = threading.Lock()
        self._used_s: dict[ProcessKey, float] = {}
        self._roles: dict[ProcessKey, str] = {}
        self._peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tree-meter", daemon=True)

    def __enter__(self) -> TreeMeter:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def cpu_s(self) -> float:
        """CPU seconds, user and system, that the tree's processes have used since each began, up to now."""
        with self._lock:
            self._look()
            return sum(self._used_s.values())

    def cpu_s_by_role(self) -> dict[str, float]:
        """The same by `ROLES`."""
        with self._lock:
            self._look()
            sums: collections.Counter[str] = collections.Counter(dict.fromkeys(ROLES, 0.0))
            for key, used_s in self._used_s.items():
                sums[self._roles[key]] += used_s
            return dict(sums)

    def peak_rss_bytes(self) -> int:
        """The most that the tree's processes held together at any look.

        Pages of their own, and those shared with others (libraries, Ray's object store) once: as many as the process
        with most of them has.
        """
        with self._lock:
            self._look()
            return self._peak_bytes

    def rss_bytes(self) -> int:
        """The same of now."""
        with self._lock:
            return self._look()

    def _watch(self) -> None:
        while not self._done.wait(_LOOK_EVERY_S):
            with self._lock:
                self._look()

    def _look(self) -> int:
        found: dict[int, tuple[int, ProcessKey, float, int, int]] = {}
        for entry in os.listdir("/proc"):  # noqa: PTH208  Path.iterdir costs thrice as much, twice a second
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    found[int(entry)] = _stat_of(int(entry))
        children: dict[int, list[int]] = {}
        for pid, (parent, *_) in found.items():
            children.setdefault(parent, []).append(pid)
        pending, own_bytes, shared_bytes = [self._root], 0, 0
        while pending:
            pid = pending.pop()
            if pid in self._leave_out or pid not in found:
                continue
            _, key, used_s, own, shared = found[pid]
            self._used_s[key] = used_s
            # At every look: a worker begins as any Python process does, and is told later what it is for.
            self._roles[key] = "own" if pid == self._root else _role_of(pid) or self._roles.get(key, "services")
            own_bytes += own
            shared_bytes = max(shared_bytes, shared)
            pending += children.get(pid, [])
        self._peak_bytes = max(self._peak_bytes, own_bytes + shared_bytes)
        return own_bytes + shared_bytes


def _stat_of(pid: int) -> tuple[int, ProcessKey, float, int, int]:
    """Parent, key, CPU seconds, and resident bytes of a process: its own and those of files and shared memory."""
    # The name, in brackets, may hold anything; the rest are numbers (proc_pid_stat(5), counted from the third).
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    used_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    resident, shared = (int(pages) * _PAGE_BYTES for pages in Path(f"/proc/{pid}/statm").read_bytes().split()[1:3])
    return int(fields[1]), (pid, int(fields[19])), used_s, resident - shared, shared


def _role_of(pid: int) -> str | None:
    """One of `ROLES` by the name that Ray gives a process; None of one that has ended."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode("utf-8", "replace")
    except OSError:
        return None
    if not title:
        return None  # it has ended, and waits to be reaped
    if title.startswith("ray::") and not title.endswith("Agent"):
        return "coordinator" if "Coordinator" in title or "Actor" in title else "readers"
    return "raylet" if title.endswith("/raylet") else "services"


def rss_bytes() -> int:
    """What this process holds now."""
    return sum(_stat_of(os.getpid())[3:])


def peak_rss_bytes() -> int:
    """The most that this process has held since its start or the last `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak() -> None:
    """Let the peak begin anew from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
