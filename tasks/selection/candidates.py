"""All documents that a curation took in, with what a run's queries say of them: the rows that a selection is made from.

Those of earlier runs stand in the ledger, those of the run in its own files; nothing here grows with the number of runs
but the tables that DuckDB looks through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.selection.curation_ledger import LEDGER, open_or_empty

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

_ROWS = 4096
"""Rows that are read at a time."""


@dataclass(frozen=True)
class Candidate:
    """A document, and what a run's queries say of it."""

    doc_id: str
    source: str
    label: str | None
    run: int
    """The run that took it in."""
    score: float
    n_tokens: int
    """Length of the whole document in the scorer's tokens."""
    query: str
    """Id of the query that it matches best."""


class Candidates:
    """The candidates of one run; see :func:`candidates`."""

    def __init__(self, con: duckdb.DuckDBPyConnection, run: int) -> None:
        self._con, self._run = con, run

    def __len__(self) -> int:
        row = self._con.execute("SELECT count(*) FROM candidates").fetchone()
        assert row is not None
        return int(row[0])

    def best(self) -> Iterator[Candidate]:
        """All of them, best first; ties by id. What else is asked ends it."""
        found = self._con.execute("SELECT * FROM candidates ORDER BY score DESC, doc_id")
        while rows := found.fetchmany(_ROWS):
            yield from (Candidate(*row) for row in rows)

    def scores(self, *, new: bool) -> NDArray[np.float64]:
        """Scores of those that the run took in, or of those of earlier runs."""
        which = "=" if new else "<"
        found = self._con.execute(f"SELECT score FROM candidates WHERE run {which} {self._run}").fetchnumpy()
        return np.asarray(found["score"], dtype=np.float64)

    def count(self, what: Literal["source", "label"], *, new: bool = False) -> dict[str, int]:
        """How many have each source or label, by its name; of all, or of those that the run took in."""
        only = f"AND run = {self._run}" if new else ""
        return dict(self._con.execute(f"SELECT {what}, count(*) FROM candidates WHERE {what} IS NOT NULL {only} "
                                      f"GROUP BY {what} ORDER BY {what}").fetchall())  # fmt: skip


@contextmanager
def candidates(
    directory: Path, documents: Path, scored: pa.Table, *, run: int, since: int, count: int
) -> Iterator[Candidates]:  # fmt: skip
    """The candidates of a run.

    Args:
        directory: of the curation; its ledger has the earlier runs.
        documents: ``documents.parquet`` of the run's intake.
        scored: what the run's queries say of the documents that it scored: doc_id, score, n_tokens, query.
        run: its number.
        since: the run from which on documents were scored by these queries and this index; the scores of earlier
            documents are those that the ledger has of it and later ones. The run itself: all are in ``scored``.
        count: how many candidates there must be.

    Raises:
        InputError: there are others: the ledger is not the one of these runs.
    """
    with open_or_empty(directory / LEDGER) as con:
        con.register("scored", scored)
        con.register("taken", con.read_parquet(str(documents)))
        con.execute(f"""
            CREATE TEMP VIEW candidates AS
            SELECT doc_id, source, label, known.run, score, n_tokens, query FROM (
                SELECT doc_id, source, label, first_run AS run FROM documents WHERE first_run < {run:d}
                UNION ALL SELECT doc_id, source, label, {run:d} FROM taken
            ) known JOIN (
                SELECT doc_id, score, n_tokens, query FROM scores WHERE run BETWEEN {since:d} AND {run - 1:d}
                UNION ALL SELECT doc_id, score, n_tokens, query FROM scored
            ) said USING (doc_id)
        """)  # fmt: skip
        made = Candidates(con, run)
        if (found := len(made)) != count:
            raise InputError(f"has scores of {found} documents, and there are {count}; move it away, and the next run "
                             "makes it again from the runs' files", file=directory / LEDGER)  # fmt: skip
        yield made
