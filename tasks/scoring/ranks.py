"""At which ranks queries find what they are to find: all that fact tracing keeps of the scores of all pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.files import whole_file
from tasks.scoring.search import Scores

RANKS = "ranks.parquet"
"""File of a scored pool: query_id, doc_id, rank, score."""


def ranks(scores_N: NDArray[np.floating], order_N: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rank of some documents in one ranking, 1 for the highest score.

    Args:
        scores_N: (N,).
        order_N: (N,) numbers that break ties: of equal scores the lower number comes first.
        places: (E,) the documents.
    """
    found = [1 + np.count_nonzero((scores_N > scores_N[place])
                                  | ((scores_N == scores_N[place]) & (order_N < order_N[place]))) for place in places]
    return np.array(found, dtype=np.int64)


def write_ranks(scores: Scores, evidence: Path, out: Path) -> None:
    """Write the rank of every document that a query is to find: query_id, doc_id, rank, score, in the evidence's order.

    A method that looks at no query has one ranking for all. Ties go to the smaller id.

    Args:
        scores: of every pair.
        evidence: Parquet with query_id and doc_id.
        out: Parquet to write.

    Raises:
        InputError: the evidence names a query or a document that was not scored.
    """
    wanted = pq.read_table(evidence, columns=["query_id", "doc_id"])
    place = {doc_id: number for number, doc_id in enumerate(scores.doc_ids)}
    row = {query_id: number for number, query_id in enumerate(scores.query_ids)}
    order_N = np.empty(len(place), dtype=np.int64)
    order_N[sorted(range(len(place)), key=scores.doc_ids.__getitem__)] = np.arange(len(place))
    by_query: dict[str, list[int]] = {}
    for number, (query_id, doc_id) in enumerate(zip(*(column.to_pylist() for column in wanted.columns), strict=True)):
        if doc_id not in place or (scores.per_query is not None and query_id not in row):
            raise InputError(f"the query {query_id} or the document {doc_id} was not scored", file=evidence,
                             row=number + 1)  # fmt: skip
        by_query.setdefault(query_id, []).append(number)
    doc_ids = wanted["doc_id"].to_pylist()
    rank_E = np.empty(len(wanted), dtype=np.int64)
    score_E = np.empty(len(wanted))
    for query_id, numbers in by_query.items():
        scores_N = scores.mean if scores.per_query is None else scores.per_query[row[query_id]]
        if np.isnan(scores_N).any():
            raise RuntimeError(f"a document has no score for the query {query_id}; nothing is written")
        places = np.array([place[doc_ids[number]] for number in numbers])
        rank_E[numbers], score_E[numbers] = ranks(scores_N, order_N, places), scores_N[places]
    with whole_file(out) as part:
        pq.write_table(wanted.append_column("rank", pa.array(rank_E)).append_column("score", pa.array(score_E)), part)
