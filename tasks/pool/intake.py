"""What is new in sources that grow: files and documents that no earlier run has seen, without near duplicates.

A file is known by the SHA-256 of its content, a document by its id and by its case-folded text. Whatever a run took in
stands in ``documents.parquet`` (kept), ``dropped.parquet`` (repeats of something kept earlier), ``files.json`` and
``skipped.jsonl``; what all earlier runs took in is asked of a :class:`Seen`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from tasks.common.config import Config
from tasks.common.errors import InputError
from tasks.common.files import read_json, sha256_file, sha256_json, whole_file, write_json, write_text
from tasks.common.progress import Progress, Report
from tasks.common.stage import whole
from tasks.pool.cleaning import lone_surrogate
from tasks.pool.documents import MAX_CHARS, SkippedRow, content_id, read_documents
from tasks.pool.duplicates import jaccard, shingles
from tasks.pool.sources import read_hub

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

VERSION = 1
"""Raise when the same files give another intake: part of every key."""
DOCUMENTS, DROPPED, FILES, SKIPPED = "documents.parquet", "dropped.parquet", "files.json", "skipped.jsonl"
SUFFIXES = (".jsonl", ".json", ".parquet")
KEPT = ("doc_id", "text", "label", "source", "file", "content")
"""String columns of ``documents.parquet``; ``bands`` (list of uint64) stands beside them."""
REPEATS = ("doc_id", "source", "file", "content", "kind", "of")
"""Columns of ``dropped.parquet``: ``kind`` is exact, near, or changed; ``of`` is the id of the document it repeats."""
_PERMUTATIONS = 128


class GrowingSource(Config):
    """One source of documents that grows: a folder of files, or a data set of the hub."""

    folder: Path | None = None
    """Folder of JSONL, JSON or Parquet files with ``text`` and optional ``id``, ``label``, ``source``. Move files in
    when they are whole; names that begin with a dot are not read."""
    pattern: str = Field("**/*", min_length=1)
    """Which files of the folder: a glob."""
    dataset: str | None = None
    """A data set of the hub, or a local folder in a data set's layout."""
    subset: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split of the data set."""
    revision: str = "main"
    """Branch of the data set to follow, or a commit to stay at."""
    text_field: str = "text"
    """Field of the data set that holds the text."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.folder is None) == (self.dataset is None):
            raise ValueError("exactly one of folder and dataset is needed")
        if self.pattern.startswith("/") or ".." in Path(self.pattern).parts:
            raise ValueError(f"the pattern {self.pattern!r} leaves the folder")
        try:
            next(Path().glob(self.pattern), None)
        except (ValueError, IndexError, NotImplementedError) as error:
            raise ValueError(f"the pattern {self.pattern!r} is no glob ({error})") from None
        return self


class IntakeConfig(Config):
    """What counts as a new document."""

    sources: dict[str, GrowingSource] = Field(min_length=1)
    """Name → source; the name is the source of documents whose rows name none."""
    near_duplicate: float = Field(0.7, ge=0.3, le=1.0)
    """Jaccard index of the character 5-grams from which a document is a near duplicate of one seen before."""
    on_bad_row: Literal["error", "skip"] = "skip"
    """A bad row or file ends the run, or is left out, counted and listed in ``skipped.jsonl``."""
    max_chars: int = Field(MAX_CHARS, ge=1)
    """Longest text taken, in characters."""

    @model_validator(mode="after")
    def _plain_names(self) -> Self:
        for name in self.sources:
            if not name.strip() or "/" in name:  # a file is known by SOURCE/PATH
                raise ValueError(f"the source {name!r} needs a name without a slash")
        return self


@dataclass(frozen=True)
class Found:
    """A file (or a revision of a data set) that no earlier run has read."""

    source: str
    """Name of the source."""
    name: str
    """Path of the file in its folder, or the data set."""
    sha256: str
    """SHA-256 of the file, or the data set's revision."""

    @property
    def key(self) -> str:
        """What ``files.json`` knows it by."""
        return f"{self.source}/{self.name}"


class Seen(Protocol):
    """What all earlier runs took in; the ledger of a curation is one."""

    def files(self) -> Mapping[str, str]:
        """:attr:`Found.key` → SHA-256 or revision it was last read at."""

    def by_id(self, doc_ids: Sequence[str]) -> Mapping[str, str]:
        """Of these ids those seen before → content."""

    def by_content(self, contents: Sequence[str]) -> Mapping[str, str]:
        """Of these contents those kept before → id."""

    def by_bands(self, bands_NB: NDArray[np.uint64]) -> Mapping[int, Sequence[tuple[str, str]]]:
        """Row → (id, text) of the documents kept before that share a band with it."""


def look(config: IntakeConfig, seen: Seen, cache: Path) -> list[Found]:
    """The files of the sources that no earlier run has read, by source and name.

    Args:
        config: the sources.
        seen: what earlier runs read.
        cache: JSON of digests by path, size and time of change, so that a file which has not changed is not read
            again. It may be lost.

    Raises:
        InputError: a folder is missing or holds no file of documents; the hub cannot be reached.
    """
    try:
        stats: dict[str, list[Any]] = read_json(cache)
    except (FileNotFoundError, ValueError):
        stats = {}
    known, found, fresh = seen.files(), list[Found](), dict[str, list[Any]]()
    for name, source in sorted(config.sources.items()):
        if source.folder is None:
            found.append(Found(name, str(source.dataset), _revision(source)))
            continue
        for path in files_of(name, source):
            relative, stat = path.relative_to(source.folder).as_posix(), path.stat()
            state = [stat.st_size, stat.st_mtime_ns]
            old = stats.get(str(path))
            fresh[str(path)] = old if old and old[:2] == state else [*state, sha256_file(path)]
            found.append(Found(name, relative, fresh[str(path)][2]))
    if fresh != stats:
        write_json(cache, fresh, checked=True)
    return [one for one in found if known.get(one.key) != one.sha256]


def files_of(name: str, source: GrowingSource) -> list[Path]:
    """The files of a folder's documents, in order.

    Raises:
        InputError: there is no such folder, or no file in it.
    """
    assert source.folder is not None
    if not source.folder.is_dir():
        raise InputError("no such folder; make it, or name another", file=source.folder,
                         field=f"sources.{name}.folder")  # fmt: skip
    files = sorted(
        path for path in source.folder.glob(source.pattern)
        if path.suffix in SUFFIXES and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(source.folder).parts)
    )  # fmt: skip
    if not files:
        raise InputError(f"holds no {', '.join(SUFFIXES)} file that matches {source.pattern!r}", file=source.folder,
                         field=f"sources.{name}.folder")  # fmt: skip
    return files


def _revision(source: GrowingSource) -> str:
    """The commit that a data set's revision stands for; of a local folder a digest of its files."""
    folder = Path(str(source.dataset))
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return sha256_json([[path.relative_to(folder).as_posix(), sha256_file(path)] for path in files])
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = HfApi().dataset_info(str(source.dataset), revision=source.revision).sha
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"the data set {source.dataset!r} cannot be had from the hub: {reason}") from None
    if commit is None:
        raise InputError(f"the hub names no commit of the data set {source.dataset!r}")
    return commit


@dataclass
class _Rows:
    """Rows as they are read, and what was wrong with others."""

    doc_id: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    label: list[str | None] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    file: list[str] = field(default_factory=list)
    skipped: list[SkippedRow] = field(default_factory=list)

    def add(self, found: Found, doc_id: str, text: str, label: str | None, source: str | None) -> None:
        self.doc_id.append(doc_id)
        self.text.append(text)
        self.label.append(label)
        self.source.append(source or found.source)
        self.file.append(found.key)


def take_in(
    config: IntakeConfig, found: Sequence[Found], seen: Seen, out: Path, *, seed: int, report: Report | None = None
) -> int:
    """Read the files and write what is new in them into the directory ``out``.

    Of documents that repeat each other the first is kept, files in order; a document seen by an earlier run is not
    counted again, but one that comes with another text under its id is dropped and listed as changed.

    Returns:
        The number of documents kept.

    Raises:
        InputError: a file changes while it is read, or ``on_bad_row`` is error and a row or file is bad.
    """
    rows = _Rows()
    for one in found:
        _read(config, one, rows)
    judged = _judge(config, rows, seen, seed, report)
    _write(out / DOCUMENTS, judged.kept, _kept_schema())
    _write(out / DROPPED, judged.dropped, _schema(REPEATS))
    write_json(out / FILES, {one.key: one.sha256 for one in found})
    lines = (json.dumps(asdict(row), ensure_ascii=False, sort_keys=True) for row in rows.skipped)
    write_text(out / SKIPPED, "".join(f"{line}\n" for line in lines))
    return len(judged.kept)


def _read(config: IntakeConfig, one: Found, rows: _Rows) -> None:
    source = config.sources[one.source]
    if source.folder is None:
        _read_dataset(config, source, one, rows)
        return
    path = source.folder / one.name
    try:
        read = read_documents(path, on_bad_row=config.on_bad_row, max_chars=config.max_chars)
    except InputError as error:
        if config.on_bad_row == "error":
            raise
        rows.skipped.append(SkippedRow(one.key, error.row or 0, error.field, error.problem))
        return
    finally:
        if not path.is_file() or sha256_file(path) != one.sha256:
            raise InputError("changed while it was read; move files into the folder when they are whole", file=path)
    rows.skipped += [SkippedRow(one.key, row.row, row.field, row.problem) for row in read.skipped]
    for row in read.table.to_pylist():
        rows.add(one, row["doc_id"], row["text"], row["label"], row["source"])


def _read_dataset(config: IntakeConfig, source: GrowingSource, one: Found, rows: _Rows) -> None:
    local = Path(str(source.dataset)).is_dir()
    texts = read_hub(str(source.dataset), subset=source.subset, split=source.split,
                     revision=None if local else one.sha256, text_field=source.text_field)  # fmt: skip
    for number, text in texts:
        if (isinstance(text, str) and text.strip() and len(text) <= config.max_chars
                and lone_surrogate(text) is None):  # fmt: skip
            rows.add(one, content_id(text), text, None, None)
            continue
        problem = f"must be a text of 1 to {config.max_chars:,} characters"
        if config.on_bad_row == "error":
            raise InputError(problem, file=source.dataset, row=number, field=source.text_field)
        rows.skipped.append(SkippedRow(one.key, number, source.text_field, problem))


@dataclass
class _Judged:
    kept: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)


def _judge(config: IntakeConfig, rows: _Rows, seen: Seen, seed: int, report: Report | None) -> _Judged:
    """Which rows are new, which repeat something, and which were seen before and are passed over."""
    judged = _Judged()
    content = [content_id(text.casefold()) for text in rows.text]
    known = dict(seen.by_id(rows.doc_id))
    owner = dict(seen.by_content(content))

    def drop(place: int, kind: str, of: str) -> None:
        judged.dropped.append({"doc_id": rows.doc_id[place], "source": rows.source[place], "file": rows.file[place],
                               "content": content[place], "kind": kind, "of": of})  # fmt: skip

    fresh: list[int] = []
    for place, doc_id in enumerate(rows.doc_id):
        if doc_id in known:
            if known[doc_id] != content[place]:
                drop(place, "changed", doc_id)
            continue
        known[doc_id] = content[place]
        if content[place] in owner:
            drop(place, "exact", owner[content[place]])
        else:
            owner[content[place]] = doc_id
            fresh.append(place)
    bands_NB = band_hashes([rows.text[place] for place in fresh], config.near_duplicate, seed)
    earlier = seen.by_bands(bands_NB)
    here: dict[int, list[tuple[str, str]]] = {}
    with Progress("near duplicates", len(fresh), "documents", report=report) as progress:
        for row, place in enumerate(fresh):
            text, bands = rows.text[place], bands_NB[row].tolist()
            candidates = {*earlier.get(row, ()), *(other for band in bands for other in here.get(band, ()))}
            of = _repeats(text, sorted(candidates), config.near_duplicate)
            if of is not None:
                drop(place, "near", of)
            else:
                judged.kept.append({"doc_id": rows.doc_id[place], "text": text, "label": rows.label[place],
                                    "source": rows.source[place], "file": rows.file[place],
                                    "content": content[place], "bands": bands})  # fmt: skip
                for band in bands:
                    here.setdefault(band, []).append((rows.doc_id[place], text))
            progress.add(1)
    return judged


def _repeats(text: str, candidates: Sequence[tuple[str, str]], threshold: float) -> str | None:
    """Id of the first candidate whose exact Jaccard index reaches the threshold."""
    grams = shingles(text.casefold()) if candidates else set()
    return next((doc_id for doc_id, other in candidates
                 if jaccard(grams, shingles(other.casefold())) >= threshold), None)  # fmt: skip


def band_hashes(texts: Sequence[str], threshold: float, seed: int) -> NDArray[np.uint64]:
    """MinHash LSH as numbers: (N, B), equal in a column where two texts are candidates for near duplicates.

    The bands are those datasketch chooses for :class:`tasks.pool.duplicates.DuplicateIndex`.
    """
    import numpy as np
    from datasketch import MinHash, MinHashLSH

    # Asked below the threshold and tuned for recall: the exact index sorts the needless candidates out.
    lsh = MinHashLSH(threshold=0.8 * threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
    blank = MinHash(num_perm=_PERMUTATIONS, seed=seed, scheme="affine32", hashfunc=zlib.crc32)
    hashes_NB = np.empty((len(texts), lsh.b), dtype=np.uint64)
    for row, text in enumerate(texts):
        sketch = blank.copy()
        sketch.update_batch([gram.encode() for gram in sorted(shingles(text.casefold()))])
        values = sketch.hashvalues.astype("<u8")
        for band, (start, stop) in enumerate(lsh.hashranges):
            digest = hashlib.blake2b(values[start:stop].tobytes(), digest_size=8, salt=band.to_bytes(2, "little"))
            hashes_NB[row, band] = int.from_bytes(digest.digest(), "little")
    return hashes_NB


def _schema(columns: Sequence[str]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in columns])


def _kept_schema() -> pa.Schema:
    import pyarrow as pa

    return _schema(KEPT).append(pa.field("bands", pa.list_(pa.uint64())))


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with whole_file(path) as part:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), part, compression="zstd")


def texts_of(intake: Path, doc_ids: Collection[str]) -> dict[str, str]:
    """Document → text, of some documents that a run took in.

    Raises:
        InputError: the intake is damaged.
    """
    import pyarrow.parquet as pq

    whole(intake)
    table = pq.read_table(intake / DOCUMENTS, columns=["doc_id", "text"], filters=[("doc_id", "in", doc_ids)])
    return dict(zip(table["doc_id"].to_pylist(), table["text"].to_pylist(), strict=True))


def read_texts(intakes: Sequence[Path], columns: Sequence[str] = KEPT) -> Iterator[pa.Table]:
    """Some columns of the documents that each of these directories of :func:`take_in` kept."""
    import pyarrow.parquet as pq

    for intake in intakes:
        yield pq.read_table(intake / DOCUMENTS, columns=list(columns))
