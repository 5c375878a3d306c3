"""Which cases are of the same subject: those must be held out, or trained on, together."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .errors import ConfigError

COPY_PATTERN = r"_copy_\d{5}$"  # what `voxflux prepare --copies` adds to a case's key
BIDS_PATTERN = r"(?:^|/)(?P<subject>sub-[0-9A-Za-z]+)(?:[_/]|$)"
BIDS = "BIDS' sub-*"
SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Subjects:
    """The subject of each case.

    Attributes:
        names: (N,) strings, the subject of each case.
        named: (N,) bool, whether a pattern or BIDS names the subject; a case that none names is known by its id only.
        rule: what names the subjects, for a message; None where case ids do.
    """

    names: pa.Array
    named: npt.NDArray[np.bool_]
    rule: str | None

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """(N,) int64, from 0 without a gap, in the order of appearance."""
        numbers: npt.NDArray[np.int64] = self.names.dictionary_encode().indices.to_numpy().astype(np.int64)
        return numbers

    def __str__(self) -> str:
        total = len(pc.unique(self.names))
        subjects = "1 subject" if total == 1 else f"{total} subjects"
        return f"{len(self.names)} cases of {subjects}" + (f" by {self.rule}" if self.rule else "")


def subjects_of(case_ids: pa.Array, pattern: str | None = None) -> Subjects:
    """Name the subject of each case.

    Copies that `prepare --copies` made are of their original's subject, whatever the pattern. Without a pattern, a case
    id with BIDS's entity `sub-LABEL`, as `sub-03_ses-1` or `sub-03/ses-1/scan`, is of the subject `sub-LABEL`, whatever
    folder it lies in; any other case is a subject of its own.

    Args:
        case_ids: (N,) strings.
        pattern: regular expression, searched for in each case id. Its first group is the subject, or the whole match
            if it has none. An empty one makes each case a subject of its own, and BIDS's names are not recognised.

    Raises:
        ConfigError: the pattern names no subject in some case ids.
    """
    originals = pc.replace_substring_regex(case_ids, COPY_PATTERN, "")
    if pattern == "":
        return Subjects(originals, np.zeros(len(originals), dtype=bool), None)
    if pattern is not None:
        names = [_subject(match) for match in map(re.compile(pattern).search, originals.to_pylist())]
        missing = [case_id for case_id, name in zip(case_ids.to_pylist(), names, strict=True) if not name]
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise ConfigError(
                f"expected --data.subject-pattern {pattern!r} to name a subject in each of {len(names)} case ids, "
                f"found none in {', '.join(missing[:SHOWN])}{more}; change the pattern so that it matches these as well"
            )
        return Subjects(pa.array(names, pa.string()), np.ones(len(names), dtype=bool), f"the pattern {pattern!r}")
    found = pc.struct_field(pc.extract_regex(originals, BIDS_PATTERN), "subject")
    named: npt.NDArray[np.bool_] = found.is_valid().to_numpy(zero_copy_only=False)
    return Subjects(pc.coalesce(found, originals), named, BIDS if named.any() else None)


def _subject(match: re.Match[str] | None) -> str | None:
    if match is None:
        return None
    subject: str | None = match[1] if match.re.groups else match[0]
    return subject
