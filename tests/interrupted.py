"""A process that is interrupted at a given instant of a task and then runs the next one: for `test_shield`.

The process runs one task, interrupts its own main thread when the task's thread has made so many function calls, and
runs the same task again. It prints what came of the first run, and the second run's digest.
"""

from __future__ import annotations

import _thread
import hashlib
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from ingest.shield import shielded


def boxes_of_blocks(blocks: int) -> Iterator[bytes]:
    """A task that imports scipy when it first needs it, as cropping does."""
    import numpy as np

    from ingest.crop import foreground_boxes

    for block in range(blocks):
        label = np.random.default_rng(block).integers(0, 3, (1, 8, 8, 8)).astype(np.uint8)
        yield repr(foreground_boxes(label)).encode()


def run(payload: bytes) -> str:
    digest = hashlib.sha256()
    for item in shielded(payload):
        digest.update(item)
    return digest.hexdigest()


def interrupt_after(calls: int) -> None:
    """Interrupt the main thread at the given call of the task's thread."""
    left = calls

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal left
        left -= event == "call"
        if left == 0:
            _thread.interrupt_main()

    threading.setprofile(count)


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    payload = pickle.dumps(Task(4))
    interrupt_after(int(sys.argv[1]))
    try:
        first = run(payload)
    except KeyboardInterrupt:
        first = "interrupted"
    threading.setprofile(None)
    print(first)
    print(run(payload))


class Task:
    """Loads as `boxes_of_blocks` with its argument; of this module, which pickle finds by name."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def __call__(self) -> Iterator[bytes]:
        return boxes_of_blocks(self.blocks)


if __name__ == "__main__":
    import tests.interrupted  # so that what is pickled is found by name, and not in __main__

    tests.interrupted.main()
