"""What `python -m ingest index`, `inspect`, `digest` and `serve` do."""

from __future__ import annotations

import dataclasses
import uuid
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from .augment import AugmentConfig
from .clean import sweep_run
from .crop import CropConfig, Shape
from .decode import DecodeConfig, LabelMap, Volume, decode_case
from .errors import BadCasesError, ConfigError, DecodeError, ObjectError
from .index import index_cases, look_up_each
from .listing import list_objects
from .manifest import Manifest, cases_of
from .pairing import PairingConfig, describe_problems, join_by_key
from .plan import ShardConfig, plan_epochs
from .quarantine import BadCaseConfig, entry_of, over_budget
from .stores.base import StoreConfig, open_store
from .transport import choose_transport, place_facts
from .unwrap import own_error

MIB = 2**20
SHOWN = 5  # bad cases that a message names before "and N more"


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
    """Whether to read every label, and keep each case's shape and foreground boxes in the manifest: so large volumes
    are read in part from the first epoch on, and nobody searches for the foreground again."""

    bad: Annotated[BadCaseConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=BadCaseConfig)
    """What to do with `boxes` about a case that cannot be read: save nothing, or keep it in the manifest, for runs to
    quarantine."""

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
    console.print(f"{len(found.manifest)} cases, {len(found.problems)} objects in none; saved to {config.output}")
    return 0


def _with_boxes(manifest: Manifest, store: StoreConfig, policy: BadCaseConfig, console: Console) -> Manifest:
    """The manifest with shapes and boxes, where the policy takes all cases that cannot be read.

    Raises:
        BadCasesError: it does not.
        QuarantineBudgetError: they are more than may be quarantined.
    """
    looked_up = look_up_each(manifest, store)
    bad = looked_up.bad
    messages = [str(entry.error) for entry in bad[:SHOWN]]
    named = "\n".join(messages) + (f"\nand {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else "")
    if not all(policy.takes(entry.error) for entry in bad):
        raise BadCasesError(
            f"expected to read all {len(manifest):,} cases, found {len(bad):,} that cannot be read; nothing was saved. "
            f"Mend or remove these, or keep them for runs to leave out, with --data.on-bad quarantine:\n{named}"
        )
    budget = policy.budget(len(manifest))
    if len(bad) > budget:
        entries = [
            entry_of(entry.error, index=entry.index, case_id=entry.case.case_id, uri=entry.uri, epoch=0)
            for entry in bad
        ]
        raise over_budget(entries, budget)
    known = [each for each in looked_up.known if each is not None]
    boxes = sum(len(of_class) for each in known for of_class in each.boxes)
    console.print(
        f"shapes and {boxes:,} foreground boxes of {len(known):,} cases; "
        f"{len(manifest) - len(known) - len(bad):,} are compressed or in Fortran order, and are always read whole"
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
    """Say what a data set holds and how it would be read; changes nothing but for one probe object on GCS."""

    images: str
    """URI of the images."""

    labels: str
    """URI of the labels."""

    sample: int = 32
    """Cases to read and check."""

    seed: int = 0
    """Which ones."""

    picture: str = "inspect.png"
    """File to draw a few image and label overlays to."""

    boxes: str | None = None
    """URI to write a manifest to, with every case's shape and foreground boxes: every label is read for it. None
    writes none."""

    pairing: PairingConfig = dataclasses.field(default_factory=PairingConfig)
    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)
    shards: ShardConfig = dataclasses.field(default_factory=ShardConfig)
    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if self.sample < 1:
            raise ConfigError(f"sample must be 1 or more; got {self.sample}")


def inspect(config: InspectConfig, console: Console) -> int:
    """Print counts, sizes, shapes, classes, pairs, orphans, storage and transport; 1 where something is amiss."""
    images, labels = open_store(config.images, config.store), open_store(config.labels, config.store)
    listed = {"images": list_objects(images), "labels": list_objects(labels)}
    table = Table("", "objects", "bytes", "smallest", "largest", "storage classes", title="what is there")
    for role, objects in listed.items():
        sizes = [entry.size_bytes for entry in objects]
        classes = Counter(entry.storage_class or "none" for entry in objects)
        table.add_row(
            role,
            f"{len(objects):,}",
            f"{sum(sizes):,}",
            f"{min(sizes):,}",
            f"{max(sizes):,}",
            ", ".join(f"{name} {count:,}" for name, count in sorted(classes.items())),
        )
    console.print(table)
    pairing = join_by_key(listed["images"], listed["labels"], config.pairing, same_place=images.uri == labels.uri)
    console.print(
        f"{len(pairing.cases):,} cases, {len(pairing.problems):,} objects in none, {pairing.ignored:,} not .npy"
    )
    if pairing.problems:
        counts = {f"{role}s": len(listed[f"{role}s"]) for role in ("image", "label")}
        console.print(describe_problems(pairing.problems, **counts))
    if not pairing.cases:
        console.print("no image and label share a key: nothing can be trained on")
        return 1
    manifest = Manifest.from_cases(pairing.cases, images_uri=images.uri, labels_uri=labels.uri)
    bad = _inspect_sample(manifest, config, console)
    if config.boxes:
        _with_boxes(manifest, config.store, BadCaseConfig(), console).save(config.boxes, config.store)
        console.print(f"manifest: {config.boxes}")
    sizes_bytes = manifest.case_bytes()
    plan = plan_epochs(case_bytes=sizes_bytes, seed=config.seed, epochs=(0,), shards=config.shards)
    console.print(
        f"an epoch reads {len(manifest):,} cases, {int(sizes_bytes.sum()) / MIB:,.1f} MiB, "
        f"in about {plan.num_shards:,} shards where volumes are read whole"
    )
    for role, uri in (("images", images.uri), ("labels", labels.uri)):
        for fact in place_facts(uri, config.store):
            console.print(f"{role}: {fact}")
    choice = choose_transport(manifest, config.store)
    console.print(f"transport: {choice.transport}: {choice.reason}")
    return 1 if bad or pairing.problems else 0


def _inspect_sample(manifest: Manifest, config: InspectConfig, console: Console) -> int:
    """Read and decode some cases, table what they are, draw a few; returns how many are bad."""
    from .overlay import draw_overlays

    sizes_bytes = manifest.case_bytes()
    plan = plan_epochs(case_bytes=sizes_bytes, seed=config.seed, epochs=(0,), shards=ShardConfig())
    chosen = plan.order[: config.sample]
    images, labels = (
        open_store(uri, dataclasses.replace(config.store, transport="direct"))
        for uri in (manifest.images_uri, manifest.labels_uri)
    )
    shapes: Counter[tuple[int, ...]] = Counter()
    voxels = np.zeros(config.decode.num_classes, dtype=np.int64)
    present = np.zeros(config.decode.num_classes, dtype=np.int64)
    drawn: list[tuple[str, Volume, LabelMap]] = []
    bad: list[str] = []
    for case in cases_of(manifest.take(chosen)):
        try:
            image_CDHW, label_1DHW = decode_case(
                images.fetch([case.image])[0],
                labels.fetch([case.label])[0],
                config.decode,
                image_name=images.uri_of(case.image.name),
                label_name=labels.uri_of(case.label.name),
            )
        except (DecodeError, ObjectError) as error:
            bad.append(str(error))
            continue
        shapes[image_CDHW.shape] += 1
        counts = np.bincount(label_1DHW.ravel(), minlength=config.decode.num_classes)
        voxels += counts
        present += counts > 0
        if len(drawn) < 6:
            drawn.append((case.case_id, image_CDHW, label_1DHW))
    good = len(chosen) - len(bad)
    console.print(f"of {len(chosen)} cases read, {good} are good and {len(bad)} bad")
    for message in bad:
        console.print(f"bad: {message}")
    if not drawn:
        return len(bad)
    for shape, count in shapes.most_common(5):
        console.print(f"shape {shape} (C, D, H, W): {count} cases")
    for value in range(config.decode.num_classes):
        console.print(
            f"class {value}: {100 * voxels[value] / voxels.sum():.1f} % of voxels, in {present[value]} of {good} cases"
        )
    draw_overlays(drawn, Path(config.picture))
    console.print(f"picture: {config.picture}")
    return len(bad)


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
    """How many epochs, from 0."""

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
    console.print(f"{len(manifest)} cases; reading by {choice.transport}: {choice.reason}")
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
                console.print(f"epoch {epoch}: {sum(e == epoch for e, _ in found)} samples")
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
