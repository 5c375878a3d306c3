"""The paired table: one row a case, in a stable order, saved and loaded as Parquet."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import posixpath
from collections.abc import Callable, Sequence
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import layout
from .errors import EncodingError, ManifestError, ObjectError, StoreError
from .gunzip import uncompressed
from .layout import Known
from .pairing import Case
from .stores.base import ObjectMeta, StoreConfig, open_store
from .subjects import Subjects, subjects_of

FORMAT = "voxflux-manifest"
FORMAT_VERSION = 1
SEAL = b"voxflux-crc32c:"
SHOWN = 3  # cases that a message names before "and N more"

SCHEMA = pa.schema(
    [
        pa.field("case_id", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("image_bytes", pa.int64(), nullable=False),
        pa.field("image_generation", pa.int64()),
        pa.field("image_crc32c", pa.uint32()),
        pa.field("label", pa.string(), nullable=False),
        pa.field("label_bytes", pa.int64(), nullable=False),
        pa.field("label_generation", pa.int64()),
        pa.field("label_crc32c", pa.uint32()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All cases of a data set, sorted by key: a case's row number is its `index`, everywhere.

    Attributes:
        table: the columns of `SCHEMA`, and those of `layout.FIELDS` where they were looked up; names are relative
            to the URIs.
        images_uri: where the images lie.
        labels_uri: where the labels lie.
    """

    table: pa.Table
    images_uri: str
    labels_uri: str

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @classmethod
    def from_cases(cls, cases: Sequence[Case], *, images_uri: str, labels_uri: str) -> Manifest:
        """Build the table from joined cases, which are sorted by key first."""
        ordered = sorted(cases, key=lambda case: case.case_id)
        columns: dict[str, list[Any]] = {"case_id": [case.case_id for case in ordered]}
        for role in ("image", "label"):
            metas: list[ObjectMeta] = [getattr(case, role) for case in ordered]
            columns[role] = [meta.name for meta in metas]
            columns[f"{role}_bytes"] = [meta.size_bytes for meta in metas]
            columns[f"{role}_generation"] = [meta.generation for meta in metas]
            columns[f"{role}_crc32c"] = [meta.crc32c for meta in metas]
        return cls(pa.table(columns, schema=SCHEMA), images_uri, labels_uri)

    def with_known(self, known: Sequence[Known | None]) -> Manifest:
        """The same cases, each with its shape and foreground boxes where they are known."""
        table = self.table.select(SCHEMA.names)
        for field, column in zip(layout.FIELDS, layout.columns(known), strict=True):
            table = table.append_column(field, column)
        return dataclasses.replace(self, table=table)

    def with_generations(self, listed: Manifest) -> Manifest:
        """The same cases, with the generations of a later listing of the same place; see `moved_to`."""
        return self.moved_to(listed)

    def moved_to(self, there: Manifest, left_out: npt.NDArray[np.int64] | None = None) -> Manifest:
        """The same cases in the same order, with the URIs, names and generations of another listing.

        Cases are the same if their ids and sizes are, and their checksums where both sides have them. Local files have
        none, so that of them only the sizes are compared.

        Args:
            there: the other listing.
            left_out: indices of cases that need not be there and are not compared, since the run quarantined them.

        Raises:
            ManifestError: the listing has other cases, or other bytes in one; the counts and the first few are named.
        """
        ids = self.table["case_id"].combine_chunks()
        others = there.table["case_id"].combine_chunks()
        rows = pc.index_in(ids, value_set=others)
        compared = np.ones(len(self), dtype=bool)
        if left_out is not None:
            compared[left_out[left_out < len(self)]] = False
        aligned = there.table.take(rows)
        absent = rows.is_null().to_numpy(zero_copy_only=False)
        differ: list[tuple[str, pa.Array]] = [
            ("missing there", ids.filter(pa.array(absent & compared))),
            ("there and not in the run", others.filter(pc.is_null(pc.index_in(others, value_set=ids)))),
        ]
        columns = {name: self.table[name].combine_chunks() for name in SCHEMA.names}
        for what, part in (("of another size", "bytes"), ("of another checksum", "crc32c")):
            other = np.zeros(len(self), dtype=bool)
            for role in ("image", "label"):
                same = pc.equal(columns[f"{role}_{part}"], aligned[f"{role}_{part}"].combine_chunks())
                other |= ~pc.fill_null(same, True).to_numpy(zero_copy_only=False)
            differ.append((what, ids.filter(pa.array(other & compared))))
        if any(len(found) for _, found in differ):
            raise ManifestError(
                f"expected the {len(self)} cases in {self.images_uri} and {self.labels_uri} with the bytes that they "
                f"had, found other ones among the {len(there)} in {there.images_uri} and {there.labels_uri}: "
                f"{_differences(differ)}; put them back, or begin a new run"
            )
        taken = pa.array(~absent & compared)
        table = self.table
        for role in ("image", "label"):
            for name in (role, f"{role}_generation", f"{role}_crc32c"):
                new = aligned[name].combine_chunks()
                if name.endswith("_crc32c"):
                    new = pc.coalesce(new, columns[name])  # a checksum of the same bytes holds in any place
                field = SCHEMA.field(name)
                values = pc.if_else(taken, new, columns[name])
                table = table.set_column(table.column_names.index(name), field, values)
        return Manifest(table, there.images_uri, there.labels_uri)

    def with_current(self, images: Sequence[ObjectMeta], labels: Sequence[ObjectMeta]) -> Manifest:
        """The same cases, with the generations of a later listing of the same place where the bytes are the same.

        An object whose size or checksum differs, or is unknown, keeps its generation: reading it then fails as stale,
        and the policies for stale and bad cases decide.

        Args:
            images: all objects of `images_uri`.
            labels: all objects of `labels_uri`.
        """
        table = self.table
        for role, listed in (("image", images), ("label", labels)):
            name = f"{role}_generation"
            now = {meta.name: meta for meta in listed}
            generations = []
            columns = (table[column].to_pylist() for column in (role, f"{role}_bytes", f"{role}_crc32c", name))
            for key, size, crc, generation in zip(*columns, strict=True):
                meta = now.get(key)
                same = meta is not None and crc is not None and (meta.size_bytes, meta.crc32c) == (size, crc)
                generations.append(meta.generation if meta is not None and same else generation)
            new = pa.array(generations, pa.int64())
            table = table.set_column(table.column_names.index(name), SCHEMA.field(name), new)
        return dataclasses.replace(self, table=table)

    def case_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of image and label together, (N,) int64, by index."""
        sizes: npt.NDArray[np.int64] = self.table["image_bytes"].to_numpy() + self.table["label_bytes"].to_numpy()
        return sizes

    def subjects(self, pattern: str | None = None) -> Subjects:
        """The subject of each case, by index; see `subjects.subjects_of`."""
        return subjects_of(self.table["case_id"].combine_chunks(), pattern)

    def id_bytes(self) -> tuple[int, int]:
        """Bytes of the shortest and of the longest case id."""
        lengths = pc.min_max(pc.binary_length(self.table["case_id"]))
        return int(lengths["min"].as_py()), int(lengths["max"].as_py())

    def take(self, indices: npt.NDArray[np.int64]) -> pa.Table:
        """The rows of these cases, in the order asked, in buffers of their own: small to pickle."""
        return self.table.take(pa.array(indices)).combine_chunks()

    def to_bytes(self) -> bytes:
        """As a Parquet file with a seal."""
        about = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "images_uri": self.images_uri,
            "labels_uri": self.labels_uri,
        }
        sink = io.BytesIO()
        metadata = {FORMAT: json.dumps(about, allow_nan=False)}
        pq.write_table(self.table.replace_schema_metadata(metadata), sink, compression="zstd")
        return seal(sink.getvalue())

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "manifest") -> Manifest:
        """Read what `to_bytes` made.

        Raises:
            ManifestError: the bytes are no manifest of this version, or damaged, or a row of it cannot be right.
        """
        _check_seal(data, name)
        try:
            table = pq.read_table(pa.BufferReader(data))
            about = json.loads((table.schema.metadata or {})[FORMAT.encode()])
            version, images_uri, labels_uri = about["version"], about["images_uri"], about["labels_uri"]
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise ManifestError(
                f"{name}: expected a Parquet file that voxflux saved, found something else "
                f"({type(error).__name__}: {error}); make it anew by leaving --data.manifest out once, or check its URI"
            ) from error
        if version != FORMAT_VERSION:
            raise ManifestError(
                f"{name}: expected manifest version {FORMAT_VERSION}, found {version!r}; "
                "read it with the voxflux that wrote it, or list the bucket into another one"
            )
        if not (isinstance(images_uri, str) and isinstance(labels_uri, str)):
            raise ManifestError(f"{name}: expected two URIs in its metadata, found {about}; make it anew")
        # Asked by name, since the names themselves may be no text in a damaged file.
        extended = any(table.schema.get_field_index(name) >= 0 for name in layout.NAMES)
        schema = pa.schema([*SCHEMA, *layout.FIELDS]) if extended else SCHEMA
        try:
            table = table.select(schema.names).cast(schema)
            table.validate(full=True)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise ManifestError(
                f"{name}: expected the columns {schema.names}, found otherwise ({error}); make it anew"
            ) from error
        table = table.replace_schema_metadata(None).combine_chunks()
        _check_rows(table, name)
        return cls(table, images_uri, labels_uri)

    def save(self, uri: str, config: StoreConfig | None = None) -> None:
        """Write to `uri`, a local path or `gs://`, whole or not at all."""
        place, name = _split_uri(uri)
        open_store(place, config).put(name, self.to_bytes())

    @classmethod
    def load(cls, uri: str, config: StoreConfig | None = None) -> Manifest:
        """Read from `uri`, a local path or `gs://`.

        Raises:
            ManifestError: there is none, or it is not one.
        """
        place, name = _split_uri(uri)
        try:
            store = open_store(place, config)
            found = next((entry for entry in store.list(name) if entry.name == name), None)
            if found is None:
                raise ManifestError(
                    f"{uri}: expected a saved manifest, found no such object; check the URI, or make one with "
                    "`voxflux index`"
                )
            data = store.fetch([found])[0]
        except EncodingError as error:
            raise ManifestError(f"{uri}: the manifest cannot be read: {error}") from error
        except ObjectError as error:
            raise ManifestError(f"{uri}: the manifest changed while it was read ({error}); try again") from error
        except StoreError as error:
            raise ManifestError(f"{uri}: the manifest cannot be read: {error}") from error
        try:
            data = uncompressed(data)
        except ValueError as error:
            raise ManifestError(
                f"{uri}: expected a Parquet file that voxflux saved, compressed or not, found {error}; upload it anew"
            ) from error
        return cls.from_bytes(data, name=uri)


def seal(parquet: bytes) -> bytes:
    """The same Parquet file with a checksum of all the rest of it just before its footer.

    Readers of Parquet go by the offsets that the footer names, so they pass over it
    (https://parquet.apache.org/docs/file-format/). Without it a flipped bit could be read as another size or name, or
    make the reader of a page take gigabytes.
    """
    at = _footer_start(parquet)
    checksum = int(google_crc32c.value(parquet))
    return parquet[:at] + SEAL + checksum.to_bytes(4, "big") + parquet[at:]


def _footer_start(data: bytes) -> int:
    return max(0, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))


def _check_seal(data: bytes, name: str) -> None:
    at = _footer_start(data)
    start = at - len(SEAL) - 4
    if data[-4:] != b"PAR1" or start < 0 or data[start : at - 4] != SEAL:
        raise ManifestError(
            f"{name}: expected a Parquet file that voxflux saved, found something else; make it anew by leaving "
            "--data.manifest out once, or check its URI"
        )
    if google_crc32c.value(data[:start] + data[at:]) != int.from_bytes(data[at - 4 : at], "big"):
        raise ManifestError(f"{name}: expected the checksum that it was saved with, found another; make it anew")


def cases_of(rows: pa.Table) -> list[Case]:
    """Rows of a manifest as cases."""
    columns = {name: rows[name].to_pylist() for name in SCHEMA.names}
    images, labels = (
        map(
            ObjectMeta,
            columns[role],
            columns[f"{role}_bytes"],
            columns[f"{role}_generation"],
            columns[f"{role}_crc32c"],
        )
        for role in ("image", "label")
    )
    return list(map(Case, columns["case_id"], images, labels))


def _differences(differ: Sequence[tuple[str, pa.Array]]) -> str:
    """The counts of cases that differ, each with the first few."""
    parts = []
    for what, ids in differ:
        if len(ids):
            more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
            parts.append(f"{len(ids)} {what} ({', '.join(ids[:SHOWN].to_pylist())}{more})")
    return ", ".join(parts)


def _check_rows(table: pa.Table, name: str) -> None:
    """Refuse what pairing never makes, so that a damaged manifest cannot mispair or repeat a case."""
    if table.num_rows == 0:
        raise ManifestError(f"{name}: expected at least one case, found none; list the bucket anew")
    checks: list[tuple[str, Callable[[], bool]]] = [
        ("no value missing", lambda: not any(table[f.name].null_count for f in SCHEMA if not f.nullable)),
        ("sizes of 0 or more", lambda: all(_minimum(table[f"{r}_bytes"]) >= 0 for r in ("image", "label"))),
        ("case ids in order, each once", lambda: _strictly_increasing(table["case_id"].to_pylist())),
        (
            "each object in one case only",
            lambda: all(len(set(table[r].to_pylist())) == table.num_rows for r in ("image", "label")),
        ),
    ]
    if layout.NAMES[0] in table.column_names:
        checks += layout.checks(table)
    for what, holds in checks:
        if not holds():
            raise ManifestError(f"{name}: expected {what}, found otherwise; the file is damaged: make it anew")


def _minimum(column: pa.ChunkedArray) -> int:
    return int(np.min(column.to_numpy()))


def _strictly_increasing(ids: list[str]) -> bool:
    return all(before < after for before, after in itertools.pairwise(ids))


def _split_uri(uri: str) -> tuple[str, str]:
    """A URI as its folder and the name in it."""
    place, name = posixpath.split(uri)
    if not name:
        raise ManifestError(f"expected the URI of a manifest such as gs://bucket/train.parquet; got {uri!r}")
    return place or ".", name
