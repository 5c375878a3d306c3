"""Ray's own record of a run's checkpoints, which Ray does not begin without where it is there and damaged."""

from __future__ import annotations

from ingest.errors import PlaceNotFoundError
from ingest.stores import open_store

from .checkpoint import FOLDER_PREFIX
from .ray_compat import RECORD_FILE, recorded_checkpoints


def drop_damaged_record(run_dir: str, goes_on_from: str | None) -> str | None:
    """Remove Ray's own record of the checkpoints where Ray could not begin with it, or would delete by it what is used.

    Ray writes it in place, so that a full disk or a crash may leave a part of it, or one of checkpoints that are gone.
    It also names checkpoints that a crash left unfinished, and damaged ones. By their number Ray deletes older ones
    when the next is stored, which is before that is finished: after another crash at that instant there would be no
    whole checkpoint. So a run goes on from the newest checkpoint of the record, or without the record.
    What a run goes on from is not in it, but in latest.json. Without it Ray begins a new one, and no longer deletes the
    checkpoints from before.

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
