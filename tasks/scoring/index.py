"""Signatures on disk: memory-mapped shards, each whole or absent, under one manifest.

``DIR/manifest.json`` is there when the index is whole and says what it was made of. A shard is
``shards/NNNNN.signatures.npy`` (N, D), ``shards/NNNNN.documents.parquet`` (doc_id, n_tokens, loss) and
``shards/NNNNN.json`` with their checksums, which is written last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.files import read_json, sha256_file, whole_file, write_json

FORMAT = 1
"""Version of the layout on disk; a reader refuses another."""
MANIFEST = "manifest.json"
PLAN = "plan.json"
STORED: dict[str, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16}


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
    write_json(plan, wanted)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def shard_done(directory: Path, number: int) -> bool:
    """Whether a shard is whole."""
    return (directory / "shards" / f"{number:05d}.json").exists()


def write_shard(
    directory: Path,
    number: int,
    *,
    signatures: NDArray[np.float32],
    doc_ids: list[str],
    n_tokens: list[int],
    losses: NDArray[np.float64] | None,
    stored: str,
) -> None:
    """Write one shard; its JSON comes last and makes it whole."""
    folder, name = directory / "shards", f"{number:05d}"
    with whole_file(folder / f"{name}.signatures.npy") as part, part.open("wb") as file:
        np.save(file, signatures.astype(STORED[stored]), allow_pickle=False)
    loss = pa.nulls(len(doc_ids), pa.float64()) if losses is None else pa.array(losses, pa.float64())
    table = pa.table({"doc_id": pa.array(doc_ids, pa.string()), "n_tokens": pa.array(n_tokens, pa.int32()),
                      "loss": loss})  # fmt: skip
    with whole_file(folder / f"{name}.documents.parquet") as part:
        pq.write_table(table, part)
    files = [f"{name}.signatures.npy", f"{name}.documents.parquet"]
    write_json(folder / f"{name}.json", {"documents": len(doc_ids), "tokens": sum(n_tokens),
                                         "sha256": {file: sha256_file(folder / file) for file in files}})  # fmt: skip


def finish(directory: Path, shard_count: int) -> None:
    """Write the manifest over all shards."""
    shards = [read_json(directory / "shards" / f"{number:05d}.json") for number in range(shard_count)]
    write_json(directory / MANIFEST, {**read_json(directory / PLAN), "shards": shards})


@dataclass(frozen=True)
class Index:
    """A whole index, opened for reading; signatures are mapped, not loaded.

    Raises:
        InputError: there is no whole index in the directory, or it has another format.
    """

    directory: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the index was made of, and its shards."""
        try:
            manifest: dict[str, Any] = read_json(self.directory / MANIFEST)
        except FileNotFoundError:
            raise InputError("holds no whole index (no manifest.json)", file=self.directory) from None
        except ValueError:
            raise InputError("is not JSON", file=self.directory / MANIFEST) from None
        if manifest.get("format") != FORMAT:
            raise InputError(f"has index format {manifest.get('format')!r}; this version reads {FORMAT}",
                             file=self.directory)  # fmt: skip
        return manifest

    def __len__(self) -> int:
        return sum(shard["documents"] for shard in self.manifest["shards"])

    @cached_property
    def documents(self) -> pa.Table:
        """doc_id, n_tokens and loss of every document, in the order of the signatures."""
        return pa.concat_tables(
            pq.read_table(self.directory / "shards" / f"{number:05d}.documents.parquet")
            for number in range(len(self.manifest["shards"]))
        )

    @cached_property
    def doc_ids(self) -> list[str]:
        """Document ids in the order of the signatures."""
        ids: list[str] = self.documents.column("doc_id").to_pylist()
        return ids

    def blocks(self, rows: int = 4096) -> Iterator[NDArray[np.float32]]:
        """Signatures (n, D) as float32, at most ``rows`` at a time, in order."""
        for number in range(len(self.manifest["shards"])):
            path = self.directory / "shards" / f"{number:05d}.signatures.npy"
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            for start in range(0, len(mapped), rows):
                yield np.asarray(mapped[start : start + rows], dtype=np.float32)
