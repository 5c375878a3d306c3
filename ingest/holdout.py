"""Which cases are held out: those of a list, a share of the subjects, or all of a second pair of URIs."""

from __future__ import annotations

import dataclasses
import importlib.resources
import posixpath
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import ConfigError, PlaceNotFoundError
from .gunzip import uncompressed
from .manifest import Manifest
from .plan import Indices, split_holdout
from .stores.base import StoreConfig, open_store

SHIPPED = {"kits19-mlperf": "kits19-mlperf-cases.txt"}
"""Lists that come with voxflux, by the name that stands for them."""

HOLDOUT_FRACTION = 0.1  # of the subjects, where nothing else is said
SHOWN = 3
COMMENT = re.compile(r"(^|\s)#.*")


@dataclasses.dataclass(frozen=True)
class Split:
    """Training and held-out cases.

    Attributes:
        train: (n,) int64, indices to train on, ascending.
        held_out: the cases to score; with no row where nothing is held out.
        indices: (h,) int64, their indices; those of a second pair follow on the manifest's own, so that an index
            names one case of the run.
        left_out: other cases of held-out subjects, such as copies, neither trained on nor scored.
        about: how many cases of how many subjects there are, and what names these.
    """

    train: Indices
    held_out: Manifest
    indices: Indices
    left_out: int = 0
    about: str = ""


def check_ways(holdout_cases: str | None, eval_images: str, eval_labels: str, subject_pattern: str | None) -> None:
    """Hold the settings of `DataConfig` that say what is held out against each other.

    Raises:
        ConfigError: two ways are given, half of one, or a pattern that is no regular expression.
    """
    try:
        re.compile(subject_pattern or "")
    except re.error as error:
        raise ConfigError(
            f"data.subject_pattern must be a regular expression; got {subject_pattern!r} ({error})"
        ) from error
    if bool(eval_images) != bool(eval_labels):
        raise ConfigError(
            f"expected data.eval_images and data.eval_labels together, found {eval_images!r} and {eval_labels!r}; give "
            "both or neither"
        )
    if eval_images and holdout_cases:
        raise ConfigError(
            f"expected one way to hold cases out, found the list {holdout_cases} and the second pair of URIs "
            f"{eval_images}; give one of them"
        )


def split_by_fraction(manifest: Manifest, seed: int, fraction: float, pattern: str | None = None) -> Split:
    """Hold out a share of the subjects; see `plan.split_holdout`.

    Args:
        manifest: of all cases.
        seed: which subjects are held out.
        fraction: share of the subjects.
        pattern: names the subject of a case id; see `subjects.subjects_of`.

    Raises:
        ConfigError: nothing would be left to train on, or the pattern names no subject in a case id.
    """
    subjects = manifest.subjects(pattern)
    train, held_out = split_holdout(seed, subjects.numbers, fraction)
    return Split(train, part_of(manifest, held_out), held_out, about=str(subjects))


def split_by_list(manifest: Manifest, names: Sequence[str], source: str, pattern: str | None = None) -> Split:
    """Hold out the listed cases; other cases of their subjects are not trained on either, nor scored.

    Args:
        manifest: of all cases.
        names: case ids; see `pick_cases`.
        source: where the list is from, for messages.
        pattern: names the subject of a case id; see `subjects.subjects_of`.

    Raises:
        ConfigError: a listed case is not in the manifest, nothing would be left to train on, or the pattern names no
            subject in a case id.
    """
    held_out = pick_cases(manifest, names, source)
    subjects = manifest.subjects(pattern)
    numbers = subjects.numbers
    kept_out = np.isin(numbers, numbers[held_out])
    train = np.flatnonzero(~kept_out)
    if len(train) == 0:
        raise ConfigError(
            f"{source}: expected cases to train on beside the {len(held_out)} listed ones, found none in "
            f"{manifest.images_uri}, which has {subjects}; shorten the list or add cases"
        )
    return Split(train, part_of(manifest, held_out), held_out, int(kept_out.sum()) - len(held_out), str(subjects))


def split_by_second(manifest: Manifest, second: Manifest, pattern: str | None = None) -> Split:
    """Train on the cases of one manifest, and score every case of another.

    Subjects that BIDS or the pattern names in both are not trained on. A case that neither names is trained on even
    where the other manifest has its id too, since `case_00001` of two data sets need not be one subject.

    Args:
        manifest: of the cases to train on.
        second: of the cases to score.
        pattern: names the subject of a case id; see `subjects.subjects_of`.

    Raises:
        ConfigError: nothing would be left to train on, or the pattern names no subject in a case id.
    """
    total = len(manifest)
    subjects, scored = manifest.subjects(pattern), second.subjects(pattern)
    both = pc.is_in(subjects.names, value_set=scored.names.filter(pa.array(scored.named)))
    kept_out = both.to_numpy(zero_copy_only=False) & subjects.named
    train = np.flatnonzero(~kept_out)
    if len(train) == 0:
        raise ConfigError(
            f"expected cases to train on in {manifest.images_uri} of other subjects than {second.images_uri} has, "
            f"found none: all {subjects} are in both; if equal names are other people there, give "
            "--data.subject-pattern ''"
        )
    indices = np.arange(total, total + len(second))
    return Split(train, second, indices, int(kept_out.sum()), str(subjects))


def pick_cases(manifest: Manifest, names: Sequence[str], source: str) -> Indices:
    """The indices of cases by their ids, (h,) int64, ascending, each once.

    Args:
        manifest: of all cases.
        names: case ids, in any Unicode form; a bare number, as MLPerf's own list has them, stands for `case_NUMBER`
            where no case is named by the number itself.
        source: where the list is from, for messages.

    Raises:
        ConfigError: a case is not in the manifest, or the list is empty.
    """
    if not names:
        raise ConfigError(f"{source}: expected case ids, one a line, found none; list the cases to hold out")
    ids = manifest.table["case_id"]
    value_set = pc.utf8_normalize(ids.combine_chunks(), form="NFC")
    given = list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in names))
    by_number = [f"case_{name}" if name.isdigit() else name for name in given]
    found = pc.coalesce(
        *(pc.index_in(pa.array(spelt, pa.string()), value_set=value_set) for spelt in (given, by_number))
    )
    wanted = list(dict.fromkeys(by_number))
    missing = [name for name, index in zip(by_number, found.to_pylist(), strict=True) if index is None]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ConfigError(
            f"{source}: expected each of its {len(wanted)} cases in {manifest.images_uri}, found {len(missing)} not "
            f"among the {len(manifest)} there: {', '.join(missing[:SHOWN])}{more} (there: {ids[0].as_py()}, …); "
            "upload them, or take them off the list"
        )
    indices: Indices = np.unique(found.to_numpy().astype(np.int64))
    return indices


def part_of(manifest: Manifest, indices: Indices) -> Manifest:
    """A manifest of some of the cases."""
    return Manifest(manifest.take(indices), manifest.images_uri, manifest.labels_uri)


def read_case_list(source: str, store: StoreConfig | None = None) -> list[str]:
    """Case ids from a text file: one a line; empty lines and comments are passed over.

    A comment begins with a # at the start of a line or after a space: a case id may contain one.

    Args:
        source: a path or URI, or the name of a list in `SHIPPED`.
        store: how to open it.

    Raises:
        ConfigError: there is no such file, or it is no text.
    """
    if source in SHIPPED:
        text = importlib.resources.files(__package__).joinpath(SHIPPED[source]).read_text(encoding="utf-8")
    else:
        place, name = posixpath.split(source)
        opened = open_store(place or ".", store)
        try:
            entry = next((entry for entry in opened.list(name) if name and entry.name == name), None)
        except PlaceNotFoundError:
            entry = None
        if entry is None:
            raise ConfigError(
                f"expected a file of case ids at {source}, found none; check the path, or name a list that comes with "
                f"voxflux: {', '.join(SHIPPED)}"
            )
        try:
            text = uncompressed(opened.fetch([entry])[0]).decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source}: expected case ids, one a line, found no text ({error}); check it") from error
        except ValueError as error:
            raise ConfigError(f"{source}: expected case ids, one a line, found {error}; upload it anew") from error
    lines = (COMMENT.sub("", line).strip() for line in text.splitlines())
    return [line for line in lines if line]
