"""The commands `voxflux index`, `inspect`, `digest` and `serve`."""

from __future__ import annotations

import dataclasses
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from .augment import AugmentConfig
from .case_faults import look_at
from .clean import sweep_run
from .crop import CropConfig, Shape
from .decode import DecodeConfig, LabelMap, Volume
from .errors import (
    BadCasesError,
    ConfigError,
    CredentialsError,
    DecodeError,
    ObjectError,
    PlaceNotFoundError,
    StoreError,
    UnreachableError,
)
from .holdout import HOLDOUT_FRACTION, split_by_fraction
from .index import index_cases, look_up_each
from .intensity import PERCENTILES, Intensities
from .listing import Listing, describe_unread, list_place
from .manifest import Manifest, cases_of
from .pairing import Pairing, PairingConfig, describe_problems, join_by_key
from .plan import ShardConfig, plan_epochs
from .quarantine import BadCaseConfig, entry_of, over_budget
from .set_checks import Wanted, check_foreground, check_smallest
from .stores.base import ObjectMeta, Store, StoreConfig, open_store
from .terminal import literal
from .transport import choose_transport, place_facts
from .unwrap import own_error

MIB = 2**20
SHOWN = 5  # bad cases that a message names before "and N more"
PICTURES = 6  # cases that `inspect` draws
NORMALISE = (
    "training normalises nothing, so normalise before you upload: clip CT to a window, subtract a mean and divide by a "
    "standard deviation of the data set (as `prepare` does, or nnU-Net's CTNormalization), and z-score each MR volume "
    "(MONAI's NormalizeIntensity)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """List and pair a data set once; later runs take the manifest and list nothing."""

    images: str
    """URI of the images."""

    labels: str
    """URI of the labels."""

    output: str
    """URI to write the manifest to, e.g. gs://bucket/train.parquet."""

    boxes: bool = False
    """Whether to read every label, and keep each case's shape and foreground boxes in the manifest. Runs then read
    large volumes in part from the first epoch on, and do not search for the foreground again."""

    bad: Annotated[BadCaseConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=BadCaseConfig)
    """Policy of `boxes` for a case that cannot be read: save no manifest, or keep the case in the manifest. Runs then
    quarantine it."""

    pairing: PairingConfig = dataclasses.field(default_factory=PairingConfig)
    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)


def index(config: IndexConfig, console: Console) -> int:
    """Save the manifest.

    Raises:
        BadCasesError, QuarantineBudgetError: `boxes` found cases that cannot be read; nothing was saved.
    """
    found = index_cases(config.images, config.labels, config.store, config.pairing)
    manifest = _with_boxes(found.manifest, config.store, config.bad, console) if config.boxes else found.manifest
    manifest.save(config.output, config.store)
    _say(console, f"{len(found.manifest)} cases, {len(found.problems)} objects in none; saved to {config.output}")
    return 0


def _with_boxes(manifest: Manifest, store: StoreConfig, policy: BadCaseConfig | None, console: Console) -> Manifest:
    """Return the manifest with shapes and boxes, and print their number.

    Args:
        manifest: the cases.
        store: how to read them.
        policy: which of the cases that cannot be read may stay in the manifest. None lets none stay; commands without
            this setting give it.
        console: where to print the counts.

    Raises:
        BadCasesError: a case cannot be read, and the policy does not let it stay.
        QuarantineBudgetError: more cases cannot be read than the policy's budget allows.
    """
    looked_up = look_up_each(manifest, store)
    bad = looked_up.bad
    messages = [str(entry.error) for entry in bad[:SHOWN]]
    named = "\n".join(messages) + (f"\nand {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else "")
    command = "" if policy else "`voxflux index --boxes` and "
    policy = policy or BadCaseConfig()
    if not all(policy.takes(entry.error) for entry in bad):
        raise BadCasesError(
            f"expected to read all {len(manifest):,} cases, found {len(bad):,} that cannot be read; no manifest was "
            "saved. Mend these or move them away, or keep them for runs to leave out, with "
            f"{command}--on-bad quarantine:\n{named}"
        )
    budget = policy.budget(len(manifest))
    if len(bad) > budget:
        entries = [
            entry_of(entry.error, index=entry.index, case_id=entry.case.case_id, uri=entry.uri, epoch=0)
            for entry in bad
        ]
        raise over_budget(entries, budget, in_a_run=False)
    known = [each for each in looked_up.known if each is not None]
    boxes = sum(len(of_class) for each in known for of_class in each.boxes)
    _say(
        console,
        f"shapes and {boxes:,} foreground boxes of {len(known):,} cases; "
        f"{len(manifest) - len(known) - len(bad):,} are compressed or in Fortran order, and are always read whole",
    )
    if bad:
        console.print(
            f"{len(bad):,} cases cannot be read; they stay in the manifest, and runs with --data.on-bad quarantine "
            f"leave them out:\n{named}",
            markup=False,
        )
    return looked_up.manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Say what a data set holds and how it would be read. Changes no data; on GCS, one probe object is written."""

    images: str
    """URI of the images."""

    labels: str
    """URI of the labels."""

    sample: int = 32
    """Cases to read and check."""

    seed: int = 0
    """Which ones."""

    patch: Shape | None = None
    """(D, H, W) of a run's patch, in voxels: volumes that do not hold it are faults. None compares nothing."""

    picture: str = "inspect.png"
    """File to draw a few image and label overlays to."""

    boxes: str | None = None
    """URI to write a manifest to, with every case's shape and foreground boxes; this reads every label. None writes
    no manifest."""

    pairing: PairingConfig = dataclasses.field(default_factory=PairingConfig)
    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)
    shards: ShardConfig = dataclasses.field(default_factory=ShardConfig)
    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if self.sample < 1:
            raise ConfigError(f"sample must be 1 or more; got {self.sample}")


def inspect(config: InspectConfig, console: Console) -> int:
    """Print the objects of a data set, the faults of a sample of cases, intensities, classes and transport.

    The checks of the whole data set are those that a run makes before it starts (`set_checks`). A fault does not end
    the inspection, unless no case is left or a store cannot be read.

    Returns:
        1 if there is a fault: a place cannot be listed, objects are in no case or have an encoding that is not read,
        a case of the sample is bad, every label is empty, a volume does not hold the patch, or the picture or the
        manifest was not written. Else 0; warnings do not count.
    """
    images, labels = open_store(config.images, config.store), open_store(config.labels, config.store)
    listed = _list_both(images, labels, console)
    if listed is None:
        return 1
    pairing, wrong = _pair(listed, config.pairing, console, same_place=images.uri == labels.uri)
    if not pairing.cases:
        _say(console, "no image and label share a key: nothing can be trained on")
        return 1
    manifest = Manifest.from_cases(pairing.cases, images_uri=images.uri, labels_uri=labels.uri)
    wrong += _inspect_sample(manifest, config, console)
    if config.boxes:
        manifest, unsaved = _save_boxes(manifest, config, console)
        wrong += unsaved
    wrong += _check_as_a_run(manifest, config, console)
    _print_reading(manifest, config, console)
    if wrong:
        _say(console, f"wrong: {'; '.join(dict.fromkeys(wrong))}")
    return 1 if wrong else 0


def _list_both(images: Store, labels: Store, console: Console) -> dict[str, Listing] | None:
    """List both places and print what they hold; None, after printing why, if one of them cannot be listed."""
    found = {role: _listed(store) for role, store in (("images", images), ("labels", labels))}
    listed = {role: listing for role, listing in found.items() if isinstance(listing, Listing)}
    for role, error in found.items():
        if isinstance(error, StoreError):
            _say(console, f"wrong: {role}: {error}")
    if len(listed) < len(found):
        return None
    _print_places(listed, console)
    return listed


def _listed(store: Store) -> Listing | StoreError:
    try:
        return list_place(store)
    except StoreError as error:
        return error


def _pair(
    listed: Mapping[str, Listing], config: PairingConfig, console: Console, *, same_place: bool
) -> tuple[Pairing, list[str]]:
    """Pair images and labels, and print the objects that are not read or in no case.

    Returns:
        The pairing, and the faults, in a few words each.
    """
    wrong = []
    for role, listing in listed.items():
        unread = describe_unread(listing.objects)
        if unread:
            _say(console, f"{role}: {unread}")
            wrong.append(f"{role} of an encoding that is not read")
    images, labels = listed["images"].objects, listed["labels"].objects
    pairing = join_by_key(images, labels, config, same_place=same_place)
    _say(
        console,
        f"{len(pairing.cases):,} cases, {len(pairing.problems):,} objects in none, {pairing.ignored:,} not .npy",
    )
    if pairing.problems:
        _say(console, describe_problems(pairing.problems, images=len(images), labels=len(labels)))
        wrong.append(f"{len(pairing.problems):,} objects in no case")
    return pairing, wrong


def _save_boxes(manifest: Manifest, config: InspectConfig, console: Console) -> tuple[Manifest, list[str]]:
    """Save the manifest with shapes and boxes.

    Returns:
        The manifest with them, or as it was if labels cannot be read; and the faults, in a few words each: it cannot
        be saved, or no label of it has foreground.
    """
    output, store = config.boxes or "", config.store
    try:
        with_boxes = _with_boxes(manifest, store, None, console)
    except BadCasesError as error:
        _say(console, f"wrong: {error}")
        return manifest, ["cases that cannot be read, so that no manifest was saved"]
    try:
        with_boxes.save(output, store)
    except StoreError as error:
        _say(console, f"wrong: {error}")
        return with_boxes, ["no manifest was saved"]
    _say(console, f"manifest: {output}")
    try:
        check_foreground(with_boxes, store, config.seed)
    except ConfigError as error:
        console.print(f"wrong: a run would refuse this data: {error}")
        return with_boxes, ["every label is empty"]
    return with_boxes, []


def _check_as_a_run(manifest: Manifest, config: InspectConfig, console: Console) -> list[str]:
    """Check the data set as a run does before it starts, and say what only a run can check.

    Returns:
        The faults, in a few words each.
    """
    direct = dataclasses.replace(config.store, transport="direct")
    wrong = []
    if config.patch is not None:
        wanted = Wanted(patch=config.patch, decode=config.decode, store=direct, bad=BadCaseConfig())
        try:
            check_smallest(manifest, wanted)
        except (ConfigError, DecodeError, ObjectError) as error:
            console.print(f"wrong: a run would refuse this data: {error}")
            wrong.append("a run would refuse its smallest volumes")
    try:
        split = split_by_fraction(manifest, config.seed, HOLDOUT_FRACTION)
    except ConfigError as error:
        console.print(f"warning: a run would refuse this data: {error}")
    else:
        console.print(
            f"a run that holds out {HOLDOUT_FRACTION:.0%} of the subjects trains on {len(split.train):,} cases and "
            f"scores {len(split.held_out):,}"
        )
    unknown = ["that the cases are enough for a batch of every rank"]
    if config.patch is None:
        unknown.insert(0, "that the volumes hold its patch (give --patch D H W)")
    console.print(f"not checked here, but by a run before it starts: {'; '.join(unknown)}")
    return wrong


def _print_reading(manifest: Manifest, config: InspectConfig, console: Console) -> None:
    """Print how much an epoch reads, in how many shards, and by which transport."""
    sizes_bytes = manifest.case_bytes()
    plan = plan_epochs(case_bytes=sizes_bytes, seed=config.seed, epochs=(0,), shards=config.shards)
    _say(
        console,
        f"an epoch reads {len(manifest):,} cases, {int(sizes_bytes.sum()) / MIB:,.1f} MiB, "
        f"in about {plan.num_shards:,} shards where volumes are read whole",
    )
    for role, uri in (("images", manifest.images_uri), ("labels", manifest.labels_uri)):
        for fact in place_facts(uri, config.store):
            _say(console, f"{role}: {fact}")
    choice = choose_transport(manifest, config.store)
    _say(console, f"transport: {choice.transport}: {choice.reason}")


def _say(console: Console, text: str) -> None:
    """Print a line without markup, because names of objects may have brackets.

    Errors name a data set's settings as training does, under `data`. These commands have them at the top.
    """
    console.print(text.replace("--data.", "--"), markup=False)


def _print_places(listed: Mapping[str, Listing], console: Console) -> None:
    headings = ("", "objects", "bytes", "smallest", "largest", "storage classes", "skipped")
    table = Table(*headings, title="what is there")
    for role, (objects, skipped) in listed.items():
        sizes = [entry.size_bytes for entry in objects]
        classes = Counter(entry.storage_class or "none" for entry in objects)
        table.add_row(
            role,
            f"{len(objects):,}",
            f"{sum(sizes):,}",
            f"{min(sizes):,}",
            f"{max(sizes):,}",
            literal(", ".join(f"{name} {count:,}" for name, count in sorted(classes.items()))),
            ", ".join(f"{len(metas):,} {kind}" for kind, metas in sorted(skipped.items())) or "none",
        )
    console.print(table)


def _inspect_sample(manifest: Manifest, config: InspectConfig, console: Console) -> list[str]:
    """Read and decode some cases, print their shapes, values and faults, and draw a few.

    Returns:
        The faults, in a few words each.
    """
    sizes_bytes = manifest.case_bytes()
    plan = plan_epochs(case_bytes=sizes_bytes, seed=config.seed, epochs=(0,), shards=ShardConfig())
    chosen = plan.order[: config.sample]
    direct = dataclasses.replace(config.store, transport="direct")
    images, labels = open_store(manifest.images_uri, direct), open_store(manifest.labels_uri, direct)
    shapes: Counter[tuple[int, ...]] = Counter()
    classes = _Classes(config.decode.num_classes)
    intensities = Intensities(config.seed)
    drawn: list[tuple[str, Volume, LabelMap]] = []
    bad: list[tuple[str, list[DecodeError | StoreError]]] = []
    for case in cases_of(manifest.take(chosen)):
        look = look_at(
            _body_of(images, case.image),
            _body_of(labels, case.label),
            config.decode,
            image_name=images.uri_of(case.image.name),
            label_name=labels.uri_of(case.label.name),
        )
        if look.image is not None:
            if look.image.ndim == 4 and len(look.image) == config.decode.channels:
                intensities.add(look.image)
            elif config.decode.channels == 1:
                intensities.add(look.image[np.newaxis])  # of one channel, whatever its axes are
        if look.label is not None:
            classes.add(look.label)
        if look.faults:
            bad.append((case.case_id, look.faults))
            continue
        assert look.image is not None  # a case without a fault has both
        assert look.label is not None
        shapes[look.image.shape] += 1
        if len(drawn) < PICTURES:
            drawn.append((case.case_id, look.image, look.label))
    wrong = []
    _say(console, f"of {len(chosen)} cases read, {len(chosen) - len(bad)} are good and {len(bad)} bad")
    for _, faults in bad:
        for fault in faults:
            _say(console, f"bad: {fault}")
    if bad:
        wrong.append(f"{len(bad)} of {len(chosen)} cases read are bad")
    for shape, count in shapes.most_common(5):
        _say(console, f"shape {shape} (C, D, H, W): {count} cases")
    _print_intensities(intensities, console)
    if shapes:
        smallest = tuple(min(shape[axis] for shape in shapes) for axis in (1, 2, 3))
        _say(console, f"a patch of these cases may have up to {smallest} voxels (D, H, W)")
    wrong += classes.report(console, manifest, config)
    return wrong + _draw(drawn, config.picture, console)


def _body_of(store: Store, meta: ObjectMeta) -> bytes | StoreError:
    """Return the object's bytes, or the error if only this object cannot be read.

    Raises:
        StoreError: the place as a whole cannot be read.
    """
    try:
        return store.fetch([meta])[0]
    except (CredentialsError, PlaceNotFoundError, UnreachableError):
        raise
    except StoreError as error:
        return error


class _Classes:
    """Counts voxels and labels of each class."""

    def __init__(self, num_classes: int) -> None:
        self._voxels = np.zeros(256, dtype=np.int64)
        self._present = np.zeros(256, dtype=np.int64)
        self._num_classes = num_classes
        self._labels = self._empty = 0

    def add(self, label_1DHW: LabelMap) -> None:
        counts = np.bincount(label_1DHW.ravel(order="K"), minlength=256)
        self._voxels += counts
        self._present += counts > 0
        self._labels += 1
        self._empty += int(counts[0] == label_1DHW.size)

    def report(self, console: Console, manifest: Manifest, config: InspectConfig) -> list[str]:
        """Print the share of each class, and the number of empty labels.

        If all labels that were added are empty, others are looked at as a run does.

        Args:
            console: where to print.
            manifest: of all cases.
            config: how labels are read.

        Returns:
            The faults, in a few words each.
        """
        if not self._labels:
            return []
        named = np.arange(256) < self._num_classes
        for value in np.flatnonzero(named | (self._present > 0)).tolist():
            _say(
                console,
                f"class {value}: {100 * self._voxels[value] / self._voxels.sum():.1f} % of voxels, in "
                f"{self._present[value]} of {self._labels} cases"
                + ("" if named[value] else "; not one of the classes"),
            )
        if not self._empty:
            return []
        if self._empty < self._labels:
            _say(console, f"{self._empty} of {self._labels} labels are empty: they have no foreground")
            return []
        try:
            warning = check_foreground(manifest, dataclasses.replace(config.store, transport="direct"), config.seed)
        except ConfigError as error:
            console.print(f"wrong: a run would refuse this data: {error}")
            return ["every label is empty"]
        if warning is not None:
            console.print(f"{warning}; look at more with --sample")
        return []


def _print_intensities(intensities: Intensities, console: Console) -> None:
    channels = intensities.channels()
    for number, stats in channels.items():
        percentiles = ", ".join(
            f"{share:g} %: {value:,.4g}" for share, value in zip(PERCENTILES, stats.percentiles, strict=True)
        )
        lost = f"; {stats.not_finite:,} voxels are not finite" if stats.not_finite else ""
        _say(
            console,
            f"channel {number} of {stats.images:,} images: min {stats.low:,.4g}, max {stats.high:,.4g}, "
            f"mean {stats.mean:,.4g}, std {stats.std:,.4g}; percentiles of a sample of voxels: {percentiles}{lost}",
        )
    for number, stats in channels.items():
        complaint = stats.complaint()
        if complaint:
            _say(console, f"warning: channel {number}: {complaint}; {NORMALISE}")


def _draw(drawn: list[tuple[str, Volume, LabelMap]], picture: str, console: Console) -> list[str]:
    if not drawn:
        return []
    from .overlay import draw_overlays

    try:
        draw_overlays(drawn, Path(picture))
    except OSError as error:
        _say(console, f"wrong: expected to write {picture}, found {error}; give another --picture")
        return ["no picture was written"]
    _say(console, f"picture: {picture}")
    return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigestConfig:
    """Print a fingerprint of all samples: the same for the same data and seed, wherever and however they are read."""

    images: str
    """URI of the images."""

    labels: str
    """URI of the labels."""

    patch: Shape
    """(D, H, W) of the patch, in voxels."""

    epochs: int = 1
    """How many epochs, from the first."""

    seed: int = 0
    """Of the order and the transforms."""

    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)
    pairing: PairingConfig = dataclasses.field(default_factory=PairingConfig)
    shards: ShardConfig = dataclasses.field(default_factory=ShardConfig)
    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)
    blocks_in_flight: int | None = None
    """Read tasks at once; None leaves it to Ray Data."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"epochs must be 1 or more; got {self.epochs}")


def digest(config: DigestConfig, console: Console) -> int:
    """Run the pipeline as training would, and print `digest HEX samples N` last."""
    from .cluster import connected_ray
    from .digest import Digests, combine, digest_batches
    from .pipeline import DataConfig, training_dataset

    data = DataConfig(
        images=config.images,
        labels=config.labels,
        seed=config.seed,
        holdout_fraction=0.0,
        crop=CropConfig(patch=config.patch),
        augment=config.augment,
        decode=config.decode,
        pairing=config.pairing,
        shards=config.shards,
        blocks_in_flight=config.blocks_in_flight,
        store=dataclasses.replace(config.store, run_id=config.store.run_id or uuid.uuid4().hex),
    )
    manifest = index_cases(data.images, data.labels, data.store, data.pairing).manifest
    choice = choose_transport(manifest, data.store)
    data = dataclasses.replace(data, store=choice.store)
    _say(console, f"{len(manifest)} cases; reading by {choice.transport}: {choice.reason}")
    found: Digests = {}
    try:
        with connected_ray():
            dataset = training_dataset(manifest, data)
            for epoch in range(config.epochs):
                try:
                    found |= digest_batches(dataset.iter_batches(batch_size=None, batch_format="numpy"))
                except Exception as error:
                    ours = own_error(error)
                    if ours is None:
                        raise
                    raise ours from error
                console.print(f"epoch {epoch + 1}: {sum(e == epoch for e, _ in found)} samples")
    finally:
        if choice.transport == "compose":
            sweep_run((data.images, data.labels), data.store.run_id, data.store)
    print(f"digest {combine(found)} samples {len(found)}")
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve DATA/BUCKET/… as gs://BUCKET/…; with `-- COMMAND …` for as long as the command runs."""

    data: str | None = None
    """Folder whose sub-folders become buckets; None serves an empty server."""

    port: int = 0
    """Port on 127.0.0.1; 0 takes a free one."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65_536:
            raise ConfigError(f"port must be from 0 to 65535; got {self.port}")


def serve(config: ServeConfig, command: list[str]) -> int:
    """Serve until interrupted, or until the command ends, whose status is returned."""
    from .emulator import serve as serve_folder

    return serve_folder(config.data, config.port, command)
