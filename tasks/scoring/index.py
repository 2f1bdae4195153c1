"""Signatures on disk: memory-mapped shards, each whole or absent, under one manifest.

``DIR/plan.json`` says what the index is made of: another model, sketch or type into it is refused. A shard is
``shards/NNNNN.signatures.npy`` (N, …) with ``NNNNN.scales.npy`` (N,) for int8, ``NNNNN.documents.parquet`` (doc_id,
n_tokens, loss) and ``NNNNN.json`` with their checksums, which is written last. ``calibration.npy`` is what a
calibration learned. ``DIR/manifest.json`` is there when the index is whole and is replaced when an append is: a reader
sees the old index or the new one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.files import forget, read_json, sha256_file, sha256_json, whole_file, write_json
from tasks.scoring import calibration, store
from tasks.scoring.config import SPREAD, IndexType, SketchConfig

FORMAT = 1
"""Version of the layout on disk; a reader refuses another."""
MANIFEST = "manifest.json"
PLAN = "plan.json"
CALIBRATION = "calibration.npy"
REFERENCE = "reference.npy"
"""What the spreads were taken over, where a calibration has them: see :mod:`tasks.scoring.spread`."""


def begin(directory: Path, identity: Mapping[str, Any]) -> None:
    """Claim ``directory`` for an index of this identity, or go on with one that was begun.

    Args:
        directory: the index.
        identity: model digest, sketch parameters, type, documents: all that decides the bytes.

    Raises:
        InputError: the directory holds an index of another identity; the first difference is named.
    """
    plan = directory / PLAN
    wanted = {"format": FORMAT, **identity}
    if plan.exists():
        begun = read_json(plan)
        for key in sorted({*begun, *wanted}):
            if begun.get(key) != wanted.get(key):
                raise InputError(
                    f"holds an index made with {key} = {_short(begun.get(key))}, not {_short(wanted.get(key))}; "
                    "choose another directory",
                    file=directory,
                )
        return
    write_json(plan, wanted, checked=True)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def shard_done(directory: Path, number: int) -> bool:
    """Whether a shard is whole: a file of it that is missing or has changed makes it none."""
    folder = directory / "shards"
    try:
        files = read_json(folder / f"{number:05d}.json")["sha256"]
        return all(sha256_file(folder / name) == sha256 for name, sha256 in files.items())
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        return False


def remove_shards(directory: Path, first: int) -> None:
    """Remove every shard from number ``first`` on: what is left of an append that was given up."""
    with os.scandir(directory / "shards") as files:
        left = sorted(file.path for file in files if file.name[:5].isdigit() and int(file.name[:5]) >= first)
    for path in left:
        os.unlink(path)


def write_shard(
    directory: Path,
    number: int,
    *,
    encoded: store.Encoder,
    doc_ids: list[str],
    n_tokens: list[int],
    losses: NDArray[np.float64] | None = None,
) -> None:
    """Write one shard; its JSON comes last and makes it whole."""
    folder, name = directory / "shards", f"{number:05d}"
    for part_name, array in encoded.arrays.items():
        with whole_file(folder / f"{name}.{part_name}.npy") as part, part.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    loss = pa.nulls(len(doc_ids), pa.float64()) if losses is None else pa.array(losses, pa.float64())
    table = pa.table({"doc_id": pa.array(doc_ids, pa.string()), "n_tokens": pa.array(n_tokens, pa.int32()),
                      "loss": loss})  # fmt: skip
    with whole_file(folder / f"{name}.documents.parquet") as part:
        pq.write_table(table, part)
    files = [*(f"{name}.{part_name}.npy" for part_name in encoded.arrays), f"{name}.documents.parquet"]
    entry = {"documents": len(doc_ids), "tokens": sum(n_tokens),
             "sha256": {file: sha256_file(folder / file) for file in files}}  # fmt: skip
    if encoded.empty:
        entry["empty"] = encoded.empty
    write_json(folder / f"{name}.json", entry, checked=True)


def write_calibration(directory: Path, fitted: calibration.Fitted) -> None:
    """Keep what a calibration learned."""
    with whole_file(directory / CALIBRATION, noted=True) as part, part.open("wb") as file:
        np.save(file, calibration.center(fitted), allow_pickle=False)


def write_reference(directory: Path, reference: NDArray[Any]) -> None:
    """Keep what spreads are taken over."""
    with whole_file(directory / REFERENCE, noted=True) as part, part.open("wb") as file:
        np.save(file, reference, allow_pickle=False)


def has_spread(directory: Path, number: int) -> bool:
    """Whether a whole shard has its documents' spreads."""
    return f"{number:05d}.spread.npy" in read_json(directory / "shards" / f"{number:05d}.json")["sha256"]


def add_spread(directory: Path, number: int, spread_N: NDArray[np.float32]) -> None:
    """Keep the spreads of a whole shard's documents beside their signatures."""
    folder, name = directory / "shards", f"{number:05d}"
    with whole_file(folder / f"{name}.spread.npy") as part, part.open("wb") as file:
        np.save(file, spread_N, allow_pickle=False)
    entry = read_json(folder / f"{name}.json")
    entry["sha256"][f"{name}.spread.npy"] = sha256_file(folder / f"{name}.spread.npy")
    write_json(folder / f"{name}.json", entry, checked=True)


def read_calibration(directory: Path, name: str) -> calibration.Fitted:
    """The calibration that :func:`write_calibration` kept."""
    return calibration.restore(name.removesuffix(SPREAD), np.load(directory / CALIBRATION, allow_pickle=False))


def written_shard(directory: Path, number: int, stored: IndexType, dimension: int) -> Shard:
    """A whole shard, whether or not a manifest names it yet."""
    folder = directory / "shards"
    return Shard(folder, number, read_json(folder / f"{number:05d}.json"), stored, dimension)


def finish(directory: Path, batch: int, shard_count: int, *, made_of: Mapping[str, Any]) -> None:
    """Write the manifest over the shards of the index so far and those of one batch of data.

    Args:
        directory: the index.
        batch: its number, 0 for the build; the shards of the batches before it come first.
        shard_count: shards of this batch.
        made_of: what is noted of the batch (``data``: SHA-256 of its file) and of the scorer (``scorer``).
    """
    plan = read_json(directory / PLAN)
    before = Index(directory).manifest if (directory / MANIFEST).exists() else {}
    batches = before.get("batches", [])
    first = sum(entry["shards"] for entry in batches[:batch])
    shards = [read_json(directory / "shards" / f"{number:05d}.json") for number in range(first, first + shard_count)]
    entry = {"data": made_of["data"], "shards": shard_count, "documents": sum(shard["documents"] for shard in shards),
             "tokens": sum(shard["tokens"] for shard in shards)}  # fmt: skip
    old = before.get("shards", [])
    manifest = {**plan, "scorer": made_of["scorer"], "batches": [*batches[:batch], entry, *batches[batch + 1 :]],
                "shards": [*old[:first], *shards, *old[first + shard_count :]]}  # fmt: skip
    if "calibration" in plan:
        manifest["calibration"] = {**plan["calibration"], "sha256": sha256_file(directory / CALIBRATION)}
        if (directory / REFERENCE).exists():
            manifest["calibration"]["reference"] = sha256_file(directory / REFERENCE)
    for name in (CALIBRATION, REFERENCE):  # the manifest has their checksums from now on
        forget(directory / name)
    write_json(directory / MANIFEST, {**manifest, "sha256": sha256_json(manifest)})


def _dimension(manifest: Mapping[str, Any]) -> int:
    return SketchConfig(**manifest["sketch"]).dimension if manifest["sketch"] else 0


@dataclass(frozen=True)
class Shard:
    """One shard of an index. Its files are mapped, and checked against their checksums when first read."""

    folder: Path
    number: int
    entry: Mapping[str, Any]
    """documents, tokens and sha256, as the manifest has them."""
    stored: IndexType
    dimension: int
    verify: bool = True
    """False where the caller has checked the files."""
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    def __len__(self) -> int:
        return int(self.entry["documents"])

    def check(self) -> None:
        """Check every file.

        Raises:
            InputError: naming one that is missing or has changed.
        """
        for name in self.entry["sha256"]:
            self._file(name.partition(".")[2])

    def _file(self, kind: str) -> Path:
        path = self.folder / f"{self.number:05d}.{kind}"
        if self.verify and kind not in self._checked:
            check_file(path, self.entry["sha256"][path.name])
            self._checked.add(kind)
        return path

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What :func:`store.encode` made, mapped."""
        return {name: np.load(self._file(f"{name}.npy"), mmap_mode="r", allow_pickle=False)
                for name in store.parts(self.stored)}  # fmt: skip

    def spread(self, rows: slice) -> NDArray[np.float32]:
        """Spreads (n,) of some rows, where the index's calibration has them."""
        kept: NDArray[np.float32] = np.load(self._file("spread.npy"), mmap_mode="r", allow_pickle=False)[rows]
        return kept

    def without_empty(self, values: NDArray[Any], rows: slice) -> NDArray[Any]:
        """``values`` (n, …) of some rows, 0 where the signature is zero and the type cannot say so itself."""
        start, stop, _ = rows.indices(len(self))
        empty = [row - start for row in self.entry.get("empty", []) if start <= row < stop]
        if empty:
            values[empty] = 0
        return values

    def signatures(self, rows: slice) -> NDArray[np.float32]:
        """Signatures (n, D) of some rows as float32; those of ``bit`` are calibrated, ±1/√D."""
        some = {name: array[rows] for name, array in self.arrays().items()}
        return self.without_empty(store.decode(some, self.stored, self.dimension), rows)

    def blocks(self, rows: int = 4096) -> Iterator[NDArray[np.float32]]:
        """:meth:`signatures` of all rows, at most ``rows`` at a time."""
        for start in range(0, len(self), rows):
            yield self.signatures(slice(start, start + rows))

    def documents(self) -> pa.Table:
        """doc_id, n_tokens and loss, in the order of the signatures."""
        return self._table()

    def doc_ids(self) -> pa.ChunkedArray:
        """Document ids in the order of the signatures."""
        return self._table(["doc_id"]).column(0)

    def _table(self, columns: list[str] | None = None) -> pa.Table:
        # A third of the time of pq.read_table, which an index of many small shards feels.
        with pq.ParquetFile(self._file("documents.parquet")) as file:
            return file.read(columns=columns, use_threads=False)


def check_file(path: Path, sha256: str) -> None:
    """Compare a file with its checksum.

    Raises:
        InputError: it is missing or has changed.
    """
    try:
        found = sha256_file(path)
    except FileNotFoundError:
        raise InputError("is missing; restore it from a copy or build the index anew", file=path) from None
    if found != sha256:
        raise InputError(f"is damaged: its SHA-256 is {found[:16]}…, it was written with {sha256[:16]}…; restore it "
                         "from a copy or build the index anew", file=path)  # fmt: skip


@dataclass(frozen=True)
class Index:
    """A whole index, opened for reading; signatures are mapped, not loaded.

    Raises:
        InputError: there is no whole index in the directory, it has another format, or a file of it has changed.
    """

    directory: Path
    verify: bool = True
    """Check each file against its checksum when it is first read."""

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the index was made of, and its shards."""
        path = self.directory / MANIFEST
        try:
            manifest: dict[str, Any] = read_json(path)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError("holds no whole index (no manifest.json)", file=self.directory) from None
        except ValueError:
            raise InputError("is damaged: it is not JSON", file=path) from None
        if manifest.get("format") != FORMAT:
            raise InputError(f"has index format {manifest.get('format')!r}; this version reads {FORMAT}",
                             file=self.directory)  # fmt: skip
        if "sha256" in manifest and manifest["sha256"] != _manifest_digest(manifest):
            raise InputError("is damaged: it is not what was written", file=path)
        return manifest

    def __len__(self) -> int:
        return sum(shard["documents"] for shard in self.manifest["shards"])

    @property
    def stored(self) -> IndexType:
        """Type of the stored signatures."""
        stored: IndexType = self.manifest["type"]
        return stored

    @cached_property
    def dimension(self) -> int:
        """D."""
        return _dimension(self.manifest)

    @property
    def calibration_name(self) -> str:
        """Name of the calibration that was fitted when the index was built; ``none`` without one."""
        return str(self.manifest.get("calibration", {"name": "none"})["name"])

    @property
    def standardizes(self) -> bool:
        """Whether the index keeps its documents' spreads, and so gives standardised scores."""
        return self.calibration_name.endswith(SPREAD)

    @cached_property
    def calibration(self) -> calibration.Fitted:
        """The calibration that was fitted when the index was built; the identity without one."""
        if self.calibration_name == "none":
            return calibration.fit("none", [])
        if self.verify:
            self.check_calibration()
        return read_calibration(self.directory, self.calibration_name)

    def check_calibration(self) -> None:
        """Compare what the calibration learned with its checksum."""
        if self.calibration_name != "none":
            kept = self.manifest["calibration"]
            check_file(self.directory / CALIBRATION, kept["sha256"])
            if "reference" in kept:
                check_file(self.directory / REFERENCE, kept["reference"])

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards, in order."""
        return [Shard(self.directory / "shards", number, entry, self.stored, self.dimension, self.verify)
                for number, entry in enumerate(self.manifest["shards"])]  # fmt: skip

    @cached_property
    def documents(self) -> pa.Table:
        """doc_id, n_tokens and loss of every document, in the order of the signatures."""
        return pa.concat_tables(shard.documents() for shard in self.shards)

    @cached_property
    def doc_ids(self) -> list[str]:
        """Document ids in the order of the signatures."""
        ids: list[str] = self.documents.column("doc_id").to_pylist()
        return ids

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Place of each shard's first document, and the number of documents last, (shards + 1,)."""
        return np.cumsum([0, *map(len, self.shards)], dtype=np.int64)

    def ids(self, places: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Document ids at some places; only their shards are read."""
        wanted = np.asarray(places, dtype=np.int64)
        shard_of = np.searchsorted(self.starts, wanted, side="right") - 1
        found = np.empty(len(wanted), dtype=object)
        for number in np.unique(shard_of):
            here = shard_of == number
            found[here] = self.shards[number].doc_ids().take(pa.array(wanted[here] - self.starts[number])).to_pylist()
        return found.tolist()

    def signatures(self, places: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Signatures (n, D) at some places, as :meth:`Shard.signatures`."""
        wanted = np.asarray(places, dtype=np.int64)
        shard_of = np.searchsorted(self.starts, wanted, side="right") - 1
        rows = [self.shards[number].signatures(slice(row, row + 1))
                for number, row in zip(shard_of, wanted - self.starts[shard_of], strict=True)]  # fmt: skip
        return np.concatenate(rows) if rows else np.zeros((0, self.dimension), dtype=np.float32)

    def spreads(self, places: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Spreads (n,) at some places, where the index keeps them."""
        wanted = np.asarray(places, dtype=np.int64)
        shard_of = np.searchsorted(self.starts, wanted, side="right") - 1
        return np.array([self.shards[number].spread(slice(row, row + 1))[0] for number, row in
                         zip(shard_of, wanted - self.starts[shard_of], strict=True)], dtype=np.float32)  # fmt: skip

    def blocks(self, rows: int = 4096) -> Iterator[NDArray[np.float32]]:
        """Signatures (n, D), as :meth:`Shard.signatures`, at most ``rows`` at a time, in order."""
        for shard in self.shards:
            yield from shard.blocks(rows)


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return sha256_json({key: value for key, value in manifest.items() if key != "sha256"})


def verify(directory: Path) -> tuple[int, int]:
    """Recompute the checksum of everything in an index.

    Returns:
        The numbers of its shards and of its documents.

    Raises:
        InputError: naming the first file that is missing or has changed.
    """
    index = Index(directory)
    manifest = index.manifest
    if "sha256" not in manifest:
        raise InputError("has no checksum of its own", file=directory / MANIFEST)
    plan = _read(directory / PLAN)
    expected = {key: manifest[key] for key in plan if key in manifest}
    if "calibration" in expected:
        expected["calibration"] = {key: value for key, value in expected["calibration"].items()
                                   if key not in ("sha256", "reference")}  # fmt: skip
    if plan != expected:
        raise InputError("is damaged: the manifest says otherwise", file=directory / PLAN)
    index.check_calibration()
    for shard in index.shards:
        path = shard.folder / f"{shard.number:05d}.json"
        if _read(path) != shard.entry:
            raise InputError("is damaged: the manifest says otherwise", file=path)
        shard.check()
    return len(index.shards), len(index)


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise InputError("is missing from the index", file=path) from None
    except ValueError:
        raise InputError("is damaged: it is not JSON", file=path) from None
