"""``curation.duckdb``: every document, score and selection of every run of a curation, and what later runs ask of it.

This module is its only writer. A run's rows come in one transaction and are made from the run's files alone, so a run
that is recorded twice stands in it once, and a ledger that was lost is made again from the runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.files import read_json
from tasks.pool.intake import DOCUMENTS, DROPPED, FILES, texts_of
from tasks.selection.database import columns_of, connect, digest_tables, make_tables, new_tables, open_tables

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

LEDGER = "curation.duckdb"
SCORES, SELECTED, DRIFT = "scores.parquet", "selected.parquet", "drift.json"
"""Files of a run's result."""
TABLES = {
    "runs": (
        "run INTEGER, started TIMESTAMP, finished TIMESTAMP, config_digest VARCHAR, digest VARCHAR, "
        "index VARCHAR, queries VARCHAR, files INTEGER, new_documents INTEGER, duplicates INTEGER, skipped INTEGER, "
        "documents INTEGER, scored_documents BIGINT, scored_tokens BIGINT, selected INTEGER, published BOOLEAN"
    ),
    "documents": (
        "doc_id VARCHAR, first_run INTEGER, source VARCHAR, file VARCHAR, label VARCHAR, content VARCHAR"
    ),
    "dropped": (
        "doc_id VARCHAR, run INTEGER, kind VARCHAR, of VARCHAR, source VARCHAR, file VARCHAR, content VARCHAR"
    ),
    "files": "run INTEGER, file VARCHAR, sha256 VARCHAR",
    "bands": "run INTEGER, hash UBIGINT, doc_id VARCHAR",
    "scores": "run INTEGER, doc_id VARCHAR, score DOUBLE, n_tokens INTEGER, query VARCHAR",
    "selections": "run INTEGER, doc_id VARCHAR, rank INTEGER, score DOUBLE, query VARCHAR",
    "drift": "run INTEGER, what VARCHAR, value DOUBLE",
}  # fmt: skip
"""Tables and their columns. ``scores`` has a run's new documents; where the queries or the index changed, all
documents: a document's score at a run is its latest row up to it. ``n_tokens`` is the document's length in the scorer's
tokens, ``query`` the query that it matches best. ``selections`` has the runs that published one. ``dropped`` are
repeats of the document ``of``; ``bands`` find the candidates for near duplicates."""
UNDIGESTED = frozenset({("runs", "started"), ("runs", "finished"), ("runs", "config_digest")})
"""Columns in which two equal runs over copies of one source can differ."""
CHECKED_BYTES = 64 << 20
"""Largest ledger that every run reads whole."""
_RUN = {"documents": "first_run"}
"""Table → its column with the run, where it is not ``run``."""


_WAY_OUT = ". Move it away, and the next run makes it again from the runs' files"


def open_curation(path: Path) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
    """A read-only connection to a ledger.

    Raises:
        InputError: there is no ledger, another process holds it for writing, or the file is none.
    """
    return open_tables(path, TABLES, maker="rise curate", way_out=_WAY_OUT)


@contextmanager
def open_or_empty(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """The same of a ledger that need not be there yet: then its tables are there, and empty."""
    if path.exists():
        with open_curation(path) as con:
            yield con
        return
    with connect(Path(":memory:"), read_only=False) as con:
        make_tables(con, TABLES)
        yield con


def check_ledger(path: Path) -> None:
    """Read a ledger whole where it is small: DuckDB compares a block with its checksum when it reads it, and no sooner.

    Raises:
        InputError: as :func:`open_curation`, or a block is damaged.
    """
    if not path.exists() or path.stat().st_size > CHECKED_BYTES:
        return
    with open_curation(path) as con:
        for table, columns in TABLES.items():
            every = ", ".join(f'max(hash("{name}"))' for name in columns_of(columns))
            con.execute(f"SELECT {every} FROM {table}").fetchall()


@dataclass(frozen=True)
class Recorded:
    """A run that is over, as the ledger has it."""

    index: str
    """Name of the index that it searched."""
    scored_documents: int
    """Documents that it put into that index."""
    scored_tokens: int
    published: bool

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Recorded:
        """Those of the columns of ``runs``."""
        return cls(*(entry[one.name] for one in fields(cls)))


def recorded(path: Path) -> dict[int, Recorded]:
    """The runs in the ledger, in order; none without one."""
    with open_or_empty(path) as con:
        rows = con.execute("SELECT run, index, scored_documents, scored_tokens, published FROM runs ORDER BY run")
        return {run: Recorded(*row) for run, *row in rows.fetchall()}


def record(path: Path, entry: Mapping[str, Any], intake: Path, result: Path) -> None:
    """Put one run into the ledger, in place of what it holds of that run.

    Args:
        path: the ledger; made where it is not.
        entry: the columns of ``runs``.
        intake: directory of :func:`tasks.pool.intake.take_in`.
        result: directory with :data:`SCORES`, :data:`SELECTED`, :data:`DRIFT`.
    """
    run = entry["run"]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():  # a file without tables is never left behind: it would be taken for something else
        with new_tables(path, TABLES):
            pass
    with connect(path, read_only=False, way_out=_WAY_OUT) as con:
        con.execute("BEGIN")
        for table in TABLES:
            con.execute(f"DELETE FROM {table} WHERE {_RUN.get(table, 'run')} = ?", [run])
        documents = str(intake / DOCUMENTS)
        con.execute("INSERT INTO documents SELECT doc_id, ?, source, file, label, content FROM read_parquet(?)",
                    [run, documents])  # fmt: skip
        con.execute("INSERT INTO bands SELECT ?, unnest(bands), doc_id FROM read_parquet(?)", [run, documents])
        con.execute("INSERT INTO dropped BY NAME SELECT *, ? AS run FROM read_parquet(?)",
                    [run, str(intake / DROPPED)])  # fmt: skip
        files = sorted(read_json(intake / FILES).items())
        _insert(con, "files", [(run, file, sha256) for file, sha256 in files])
        con.execute("INSERT INTO scores SELECT ?, doc_id, score, n_tokens, query FROM read_parquet(?)",
                    [run, str(result / SCORES)])  # fmt: skip
        if entry["published"]:
            con.execute("INSERT INTO selections SELECT ?, doc_id, rank, score, query FROM read_parquet(?)",
                        [run, str(result / SELECTED)])  # fmt: skip
        _insert(con, "drift", [(run, what, value) for what, value in read_json(result / DRIFT).items()])
        _insert(con, "runs", [tuple(entry[name] for name in columns_of(TABLES["runs"]))])
        con.execute("COMMIT")


def _insert(con: duckdb.DuckDBPyConnection, table: str, values: list[tuple[Any, ...]]) -> None:
    if values:
        con.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values[0]))})", values)


class LedgerSeen:
    """What all recorded runs took in: a :class:`tasks.pool.intake.Seen`."""

    def __init__(self, path: Path, intakes: Mapping[int, Path]) -> None:
        """
        Args:
            path: the ledger; none is the same as an empty one.
            intakes: run → its intake, where the texts stand.
        """
        self._path, self._intakes = path, intakes

    def files(self) -> dict[str, str]:
        """File → SHA-256 it was last read at."""
        return dict(self._rows("SELECT file, arg_max(sha256, run) FROM files GROUP BY file"))

    def by_id(self, doc_ids: Sequence[str]) -> dict[str, str]:
        """Of these ids those seen before → content."""
        return dict(self._asked("""
            SELECT doc_id, arg_min(content, (rough, run)) FROM (
                SELECT doc_id, content, 0 AS rough, first_run AS run FROM documents
                UNION ALL SELECT doc_id, content, 1, run FROM dropped WHERE kind <> 'changed'
            ) SEMI JOIN asked ON doc_id = value GROUP BY doc_id
        """, doc_ids))  # fmt: skip

    def by_content(self, contents: Sequence[str]) -> dict[str, str]:
        """Of these contents those kept before → id."""
        return dict(self._asked("SELECT content, doc_id FROM documents SEMI JOIN asked ON content = value", contents))

    def by_bands(self, bands_NB: NDArray[np.uint64]) -> dict[int, list[tuple[str, str]]]:
        """Row → (id, text) of the documents kept before that share a band with it."""
        import numpy as np
        import pyarrow as pa

        rows, bands = bands_NB.shape
        pairs = self._rows("""
            SELECT DISTINCT asked.row, bands.run, bands.doc_id FROM bands JOIN asked USING (hash)
        """, asked=pa.table({"row": np.repeat(np.arange(rows), bands), "hash": bands_NB.ravel()}))  # fmt: skip
        wanted: dict[int, set[str]] = defaultdict(set)
        for _, run, doc_id in pairs:
            wanted[run].add(doc_id)
        texts = {run: texts_of(self._intakes[run], doc_ids) for run, doc_ids in wanted.items()}
        found: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for row, run, doc_id in pairs:
            found[row].append((doc_id, texts[run][doc_id]))
        return found

    def _asked(self, sql: str, values: Sequence[str]) -> list[tuple[Any, ...]]:
        import pyarrow as pa

        return self._rows(sql, asked=pa.table({"value": pa.array(values, pa.string())}))

    def _rows(self, sql: str, asked: pa.Table | None = None) -> list[tuple[Any, ...]]:
        if not self._path.exists() or (asked is not None and not len(asked)):
            return []
        with open_curation(self._path) as con:
            if asked is not None:
                con.register("asked", asked)
            return con.execute(sql).fetchall()


def curation_digest(path: Path) -> str:
    """SHA-256 over all rows of all tables, whatever their order in the file, but :data:`UNDIGESTED`.

    Raises:
        InputError: as :func:`open_curation`.
    """
    with open_curation(path) as con:
        return digest_tables(con, TABLES, UNDIGESTED)
