"""Stage 3 of Algorithm 1: scores of all documents, mean-pooled over the queries and per query."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.scoring import calibration
from tasks.scoring.index import Index


@dataclass(frozen=True)
class Scores:
    """Scores of N documents for Q queries; higher is more influential."""

    doc_ids: list[str]
    mean: NDArray[np.float64]
    """(N,): what the ranking is made from."""
    query_ids: list[str]
    per_query: NDArray[np.float32] | None
    """(Q, N); None for a method that does not look at the queries."""


def score(pool: Index, queries: Index, *, calibrated: str = "none") -> Scores:
    """score(x_i) = φ(x_i)ᵀ φ̄_Q (Algorithm 1), with both sides calibrated by what the pool alone says."""
    fitted = calibration.fit(calibrated, pool.blocks())
    query_QD = fitted.apply(np.concatenate(list(queries.blocks())))
    pooled_D = query_QD.mean(axis=0, dtype=np.float64)
    per_query: list[NDArray[np.float32]] = []
    mean: list[NDArray[np.float64]] = []
    for block in pool.blocks():
        phi_ND = fitted.apply(block)
        per_query.append(query_QD @ phi_ND.T)
        mean.append(phi_ND.astype(np.float64) @ pooled_D)
    return Scores(pool.doc_ids, np.concatenate(mean), queries.doc_ids, np.concatenate(per_query, axis=1))
