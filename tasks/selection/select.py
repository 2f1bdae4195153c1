"""Top-K of a ranking, and the oracle arm that knows the labels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.common.errors import InputError
from tasks.common.files import whole_file, write_json
from tasks.selection.config import SelectionConfig

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
"""Raise when the same inputs give other files: part of every cache key."""
SELECTED = "selected.parquet"
NOTES = "notes.json"


def select(config: SelectionConfig, scores: Path, pool: Path, out: Path) -> int:
    """Write the K highest-scored documents of the pool to ``out/selected.parquet``; ties go to the smaller id.

    Args:
        scores: Parquet with doc_id and score, one row a pool document.
        pool: Parquet with doc_id, text, label, source.
        out: directory; ``selected.parquet`` holds doc_id, text, label, source, rank (1 is best), by rank.

    Returns:
        K.

    Raises:
        InputError: K is larger than the pool, a score is missing or no number, or the two files disagree on the ids.
    """
    documents = read_pool(pool)
    ranking = read_ranking(scores, documents, pool)
    k = config.size(documents.num_rows)
    _write(documents, ranking["doc_id"].to_pylist()[:k], out)
    write_json(out / NOTES, [])
    return k


def oracle(config: SelectionConfig, pool: Path, out: Path) -> int:
    """Write K positive documents, drawn by seeded hash of their ids: what a selection without error would train on.

    A pool with fewer than K positive documents gives all of them, and ``out/notes.json`` says so.

    Returns:
        The number of documents selected.

    Raises:
        InputError: K is larger than the pool, or no document has the positive label.
    """
    documents = read_pool(pool)
    k = config.size(documents.num_rows)
    labels = documents["label"].to_pylist()
    positive = [
        doc_id
        for doc_id, label in zip(documents["doc_id"].to_pylist(), labels, strict=True)
        if label == config.positive
    ]
    if not positive:
        raise InputError(
            f"no document has the positive label {config.positive!r}, so there is nothing an oracle could select",
            file=pool, field="label",
        )  # fmt: skip
    drawn = sorted(positive, key=lambda doc_id: (hashlib.sha256(f"{config.seed}:{doc_id}".encode()).digest(), doc_id))
    _write(documents, drawn[:k], out)
    notes = []
    if len(positive) < k:
        notes.append(
            f"The oracle trains on {len(positive)} documents and not on {k}: "
            f"the pool has no more with the label {config.positive!r}."
        )
    write_json(out / NOTES, notes)
    return min(k, len(positive))


def read_pool(path: Path) -> pa.Table:
    """A pool's doc_id, text, label and source.

    Raises:
        InputError: two documents have one id.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["doc_id", "text", "label", "source"])
    counts = table.group_by("doc_id").aggregate([([], "count_all")])
    twice = counts.filter(pc.greater(counts["count_all"], 1))["doc_id"].to_pylist()
    if twice:
        raise InputError(f"two documents have the id {min(twice)!r}", file=path, field="doc_id")
    return table


def read_ranking(scores: Path, documents: pa.Table, pool: Path) -> pa.Table:
    """A method's ranking of a pool: doc_id, score, rank (1 is best), by score downwards and then by id upwards.

    Raises:
        InputError: a score is missing, no number or infinite, is there twice, or is of a document outside the pool.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(scores)
    for column in ("doc_id", "score"):
        if column not in table.column_names:
            raise InputError(f"has no column {column!r}", file=scores, field=column)
    doc_ids = table["doc_id"].to_pylist()
    # Adding zero turns -0.0 into 0.0: one value, one place in the ranking.
    values = np.asarray(table["score"].cast(pa.float64()).to_numpy(), dtype=np.float64) + 0.0
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        raise InputError(
            f"the score of document {doc_ids[wrong[0]]!r} is {values[wrong[0]]}; score the pool again",
            file=scores, row=int(wrong[0]) + 1, field="score",
        )  # fmt: skip
    _same_ids(doc_ids, documents["doc_id"].to_pylist(), scores, pool)
    table = pa.table({"doc_id": pa.array(doc_ids, pa.string()), "score": values})
    table = table.sort_by([("score", "descending"), ("doc_id", "ascending")])
    return table.append_column("rank", pa.array(range(1, table.num_rows + 1), pa.int32()))


def _same_ids(scored: list[str], pooled: list[str], scores: Path, pool: Path) -> None:
    known = set(pooled)
    seen: set[str] = set()
    for row, doc_id in enumerate(scored, start=1):
        if doc_id not in known:
            raise InputError(f"the document {doc_id!r} is not in the pool {pool}", file=scores, row=row, field="doc_id")
        if doc_id in seen:
            raise InputError(f"the document {doc_id!r} is scored twice", file=scores, row=row, field="doc_id")
        seen.add(doc_id)
    for row, doc_id in enumerate(pooled, start=1):
        if doc_id not in seen:
            raise InputError(f"the document {doc_id!r} has no score in {scores}", file=pool, row=row, field="doc_id")


def _write(documents: pa.Table, chosen: list[str], out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = {doc_id: row for row, doc_id in enumerate(documents["doc_id"].to_pylist())}
    table = documents.take([place[doc_id] for doc_id in chosen])
    table = table.append_column("rank", pa.array(range(1, len(chosen) + 1), pa.int32()))
    with whole_file(out / SELECTED) as part:
        pq.write_table(table, part)
