"""Ray's own record of a run's checkpoints. A damaged one keeps Ray from starting, so it is removed."""

from __future__ import annotations

from ingest.errors import PlaceNotFoundError
from ingest.stores import open_store

from .checkpoint import FOLDER_PREFIX
from .ray_compat import RECORD_FILE, recorded_checkpoints


def drop_damaged_record(run_dir: str, goes_on_from: str | None) -> str | None:
    """Remove Ray's own record of the checkpoints if Ray could not start with it, or would delete too much by it.

    Ray could not start: it writes the record in place, so a full disk or a crash may leave a part of it, and a record
    may name checkpoints that are gone.

    Ray would delete too much: the record also counts checkpoints that a crash left unfinished, and damaged ones. When
    Ray stores the next checkpoint, it deletes the oldest of the record, before the new one is finished. A crash at that
    instant would leave no whole checkpoint. So the record is kept only if its newest checkpoint is the one that the run
    goes on from.

    Nothing else is lost with the record: latest.json names what a run goes on from. Ray begins a new record, and no
    longer deletes the checkpoints from before.

    Args:
        run_dir: the run's folder or gs:// place.
        goes_on_from: the checkpoint that the run goes on from; None at its start.

    Returns:
        What was wrong, in words; None where it is whole, or there is none.

    Raises:
        StoreError: the folder cannot be read or written.
    """
    store = open_store(run_dir)
    try:
        found = next((entry for entry in store.list(RECORD_FILE) if entry.name == RECORD_FILE), None)
        if found is None:
            return None
        there = {entry.name.partition("/")[0] for entry in store.list(FOLDER_PREFIX) if "/" in entry.name}
    except PlaceNotFoundError:
        return None
    place = store.uri_of(RECORD_FILE)
    try:
        recorded = recorded_checkpoints(store.fetch([found])[0])
        gone = [name for name in recorded if name not in there]
        newest = recorded[-1] if recorded else goes_on_from
        if not gone and newest == goes_on_from:
            return None
        if gone:
            wrong = f"expected the checkpoints that {place} names, found no {gone[0]}"
        else:
            begins = goes_on_from or "its start"
            wrong = f"expected {begins}, which the run goes on from, to be the newest of {place}, found {newest}"
    except (ValueError, KeyError, TypeError) as error:
        wrong = f"{place}: expected Ray's record of checkpoints, found damage ({(str(error).splitlines() or [''])[0]})"
    store.delete(RECORD_FILE, found.generation)
    return f"{wrong}; it was removed: Ray begins a new one, and keeps the checkpoints from before until you delete them"
