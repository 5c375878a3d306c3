"""Joins images and labels into cases by key, never by position."""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from .errors import ConfigError, PairingError
from .names import same_form, visible
from .stores.base import ObjectMeta

logger = logging.getLogger(__name__)

SUFFIXED_IMAGE = r"(.+)_x\.npy"
SUFFIXED_LABEL = r"(.+)_y\.npy"
EQUAL_NAMES = r"(.+)\.npy"
VOLUME_LIKE = re.compile(r"\.npy(\.\w+)?$", re.IGNORECASE)  # also .NPY and .npy.gz: a volume that would go unread
READABLE = re.compile(r"\.npy(\.gz)?$", re.IGNORECASE)  # names of volumes that are read if a pattern takes them
CONVERT = "only volumes stored as .npy or .npy.gz are read: convert other formats to one of these"
SHOWN = 3  # names shown in a message before "and N more"


class Case(NamedTuple):
    """One image and one label with the same key."""

    case_id: str
    image: ObjectMeta
    label: ObjectMeta


class Problem(NamedTuple):
    """One object that is in no case.

    Attributes:
        kind: `image-without-label`, `label-without-image`, `duplicate-key` or `name-without-key`.
        role: `image` or `label`.
        name: the object's name, relative to its URI.
        key: its key; empty where the name has none.
    """

    kind: str
    role: str
    name: str
    key: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairingConfig:
    """How names become keys."""

    image_pattern: str | None = None
    """Regular expression with one group, the key, matched against an image's whole name relative to its URI.
    None: names ending in `_x.npy` and `_y.npy` where both are found, else equal names ending in `.npy`."""

    label_pattern: str | None = None
    """The same for labels. Give both patterns or neither."""

    on_orphan: Literal["fail", "quarantine"] = "fail"
    """What to do with objects that are in no case: stop, or report them and go on without."""

    def __post_init__(self) -> None:
        if (self.image_pattern is None) != (self.label_pattern is None):
            raise ConfigError(
                "expected image_pattern and label_pattern together, found only one of them; give the other too"
            )
        for field in ("image_pattern", "label_pattern"):
            pattern = getattr(self, field)
            if pattern is None:
                continue
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ConfigError(f"{field}: {pattern!r} is not a regular expression ({error}); mend it") from error
            if groups != 1:
                raise ConfigError(
                    f"{field}: expected one group, the key, found {groups} in {pattern!r}; "
                    "make other groups non-capturing with (?:…)"
                )
        if self.on_orphan not in ("fail", "quarantine"):
            raise ConfigError(f"on_orphan must be fail or quarantine; got {self.on_orphan!r}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """What joining gave: cases in byte order of keys, what is in no case, and what is no volume at all."""

    cases: list[Case]
    problems: list[Problem]
    ignored: int
    """Objects that are no volume by their name (notes, manifests): counted and logged, in no case by right."""


def choose_patterns(
    images: Iterable[ObjectMeta], labels: Iterable[ObjectMeta], config: PairingConfig, *, same_place: bool = False
) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The patterns for images and labels: those configured, else the convention the names follow.

    The choice is one for the whole data set, so that no two objects of a role can come by the same key in two
    ways.
    """
    if config.image_pattern is not None and config.label_pattern is not None:
        return re.compile(same_form(config.image_pattern)), re.compile(same_form(config.label_pattern))
    suffixed_image, suffixed_label = re.compile(SUFFIXED_IMAGE), re.compile(SUFFIXED_LABEL)
    both = any(suffixed_image.fullmatch(o.name) for o in images) and any(
        suffixed_label.fullmatch(o.name) for o in labels
    )
    if both or same_place:  # in one place equal names would make each object its own label
        return suffixed_image, suffixed_label
    return re.compile(EQUAL_NAMES), re.compile(EQUAL_NAMES)


def join_by_key(
    images: Sequence[ObjectMeta],
    labels: Sequence[ObjectMeta],
    config: PairingConfig | None = None,
    *,
    same_place: bool = False,
) -> Pairing:
    """Join by key and report everything that does not fit; the order of the listings does not matter.

    Args:
        images: what the image URI holds.
        labels: what the label URI holds.
        config: how names become keys.
        same_place: the two URIs are one, so each listing also holds the other role's objects.

    Returns:
        Cases sorted by key. Keys are in Unicode's composed form (NFC), so names that differ only in their form have
        one key; the objects keep their names as listed. A key that two objects of a role share makes no case at all:
        which of the two is right cannot be known.
    """
    config = config or PairingConfig()
    image_pattern, label_pattern = choose_patterns(images, labels, config, same_place=same_place)
    problems: list[Problem] = []
    ignored = 0
    by_role: list[dict[str, list[ObjectMeta]]] = []
    for role, objects, pattern, other in (
        ("image", images, image_pattern, label_pattern),
        ("label", labels, label_pattern, image_pattern),
    ):
        by_key: dict[str, list[ObjectMeta]] = {}
        for entry in objects:
            name = same_form(entry.name)
            match = pattern.fullmatch(name)
            if match is not None:
                by_key.setdefault(match.group(1) or "", []).append(entry)
            elif same_place and other.fullmatch(name) is not None:
                continue
            elif VOLUME_LIKE.search(entry.name):
                problems.append(Problem("name-without-key", role, entry.name, ""))
            else:
                ignored += 1
        by_role.append(by_key)
    images_by_key, labels_by_key = by_role
    cases: list[Case] = []
    for key in sorted(images_by_key.keys() | labels_by_key.keys()):
        image_entries, label_entries = images_by_key.get(key, []), labels_by_key.get(key, [])
        if len(image_entries) == 1 and len(label_entries) == 1:
            cases.append(Case(key, image_entries[0], label_entries[0]))
            continue
        doubled = len(image_entries) > 1 or len(label_entries) > 1
        for role, entries, orphan in (
            ("image", image_entries, "image-without-label"),
            ("label", label_entries, "label-without-image"),
        ):
            problems.extend(Problem("duplicate-key" if doubled else orphan, role, e.name, key) for e in entries)
    return Pairing(cases=cases, problems=problems, ignored=ignored)


def pair_cases(
    images: Sequence[ObjectMeta],
    labels: Sequence[ObjectMeta],
    config: PairingConfig | None = None,
    *,
    same_place: bool = False,
) -> Pairing:
    """As `join_by_key`, and held to the policy.

    Raises:
        PairingError: something is in no case and the policy is `fail`; or there is no case at all.
    """
    config = config or PairingConfig()
    pairing = join_by_key(images, labels, config, same_place=same_place)
    if pairing.ignored:
        logger.warning("%d objects are no .npy by their name, and are in no case", pairing.ignored)
    if pairing.problems:
        text = describe_problems(pairing.problems, images=len(images), labels=len(labels))
        if config.on_orphan == "fail":
            ways = _ways_to_pair(pairing.problems, images, labels, same_place=same_place)
            raise PairingError(
                f"{text}; upload what is missing, {ways}, or leave these out with --data.pairing.on-orphan quarantine"
            )
        logger.warning("%s; left out", text)
    if not pairing.cases:
        ways = _ways_to_pair(pairing.problems, images, labels, same_place=same_place)
        raise PairingError(
            f"expected at least one image and label of the same key, found none among {len(images)} objects "
            f"for images (first: {_first(images)}) and {len(labels)} for labels (first: {_first(labels)}); "
            f"check the two URIs, {ways}; {CONVERT}"
        )
    return pairing


def patterns_for(images: Iterable[str], labels: Iterable[str], *, same_place: bool = False) -> tuple[str, str]:
    """Return patterns that give a key to every volume that can be read, also to those named `.npy.gz` or `.NPY`.

    Args:
        images: names of images.
        labels: names of labels.
        same_place: as for `join_by_key`.
    """
    names = [*images], [*labels]
    ending = r"\.npy(?:\.gz)?"
    if any(READABLE.search(name) and not name.endswith((".npy", ".npy.gz")) for name in (*names[0], *names[1])):
        ending = f"(?i:{ending})"
    suffixed = [f"(.+)_{letter}{ending}" for letter in "xy"]
    if same_place or all(
        any(re.fullmatch(pattern, name) for name in role) for pattern, role in zip(suffixed, names, strict=True)
    ):
        return suffixed[0], suffixed[1]
    return f"(.+){ending}", f"(.+){ending}"


def _ways_to_pair(
    problems: Sequence[Problem], images: Sequence[ObjectMeta], labels: Sequence[ObjectMeta], *, same_place: bool
) -> str:
    """Return advice about objects that match no pattern. Its options can be copied into a shell."""
    names = [problem.name for problem in problems if problem.kind == "name-without-key"]
    readable = [name for name in names if READABLE.search(name)]
    others = [name for name in names if not READABLE.search(name)]
    ways = "name keys with --data.pairing.image-pattern and --data.pairing.label-pattern"
    if readable:
        listed = ([same_form(entry.name) for entry in objects] for objects in (images, labels))
        image, label = patterns_for(*listed, same_place=same_place)
        ways = (
            f"read names such as {visible(readable[0])} with --data.pairing.image-pattern {shlex.quote(image)} "
            f"--data.pairing.label-pattern {shlex.quote(label)}"
        )
    if others:
        ways += f", store volumes such as {visible(others[0])} as .npy or .npy.gz"
    return ways


def describe_problems(problems: Sequence[Problem], *, images: int, labels: int) -> str:
    """One sentence a kind: how many of how many, and the first few names."""
    totals = {"image": images, "label": labels}
    counts = Counter((p.kind, p.role) for p in problems)
    sentences: list[str] = []
    for (kind, role), count in sorted(counts.items()):
        mine = [p for p in problems if p.kind == kind and p.role == role]
        names = ", ".join(_shown(p) for p in mine[:SHOWN]) + (f" and {count - SHOWN} more" if count > SHOWN else "")
        what = {
            "image-without-label": "have no label",
            "label-without-image": "have no image",
            "duplicate-key": f"share their key with another object (first key: {mine[0].key!r})",
            "name-without-key": "are .npy by their name but match no naming pattern",
        }[kind]
        sentences.append(
            f"expected every {role} to be in exactly one case; {count} of {totals[role]} {role}s {what}: {names}"
        )
    return "; ".join(sentences)


def _shown(problem: Problem) -> str:
    # Two names of one key may differ in their Unicode form only, and then look the same.
    return (
        ascii(problem.name) if problem.kind == "duplicate-key" and not problem.name.isascii() else visible(problem.name)
    )


def _first(objects: Sequence[ObjectMeta]) -> str:
    return visible(objects[0].name) if objects else "none"
