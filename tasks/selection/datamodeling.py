"""The linear datamodeling score: do the scores of its documents foretell what training on a subset does (Table 16)?

With s_q(i) the score of document i for query q, S_1, S_2, … random halves of the pool, and L_q(S) the query's negative
log-likelihood per token after training on S, averaged over the seeds of the training:

    LDS = mean over q of Spearman over j of ( Σ_{i ∈ S_j} s_q(i), −L_q(S_j) )
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.selection.retrieval import read_per_query
from tasks.selection.select import read_pool, read_ranking

if TYPE_CHECKING:
    from numpy.typing import NDArray


def half(documents: int, subset: int, seed: int) -> NDArray[np.int64]:
    """Places of the ⌊documents / 2⌋ documents of one random subset, ascending: a function of its arguments alone."""
    order = np.random.default_rng([seed, subset]).permutation(documents)
    return np.sort(order[: documents // 2])


def predictions(scores_QN: NDArray[np.float64], halves: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Σ of each subset's scores, (Q, S), less what every subset of one size has: half of the pool at the query's lowest
    score. So equal scores add up to exactly equal sums, and rounding orders nothing.

    Args:
        scores_QN: (queries, documents), higher is better.
        halves: the subsets' places in N, all of one size.
    """
    above_QN = scores_QN - scores_QN.min(axis=1, keepdims=True)
    return np.stack([above_QN[:, places].sum(axis=1) for places in halves], axis=1)


def spearman(left_QS: NDArray[np.float64], right_QS: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's rank correlation of every row, (Q,), ties at their mean rank; 0 where a row is constant: it orders
    nothing."""
    from scipy.stats import rankdata

    left, right = (ranks - ranks.mean(axis=1, keepdims=True)
                   for ranks in (rankdata(left_QS, axis=1), rankdata(right_QS, axis=1)))  # fmt: skip
    norms_Q = np.sqrt((left**2).sum(axis=1) * (right**2).sum(axis=1))
    return np.divide((left * right).sum(axis=1), norms_Q, out=np.zeros(len(left)), where=norms_Q > 0)


@dataclass(frozen=True)
class Score:
    """A linear datamodeling score and its interval."""

    lds: float
    low: float
    high: float


def datamodeling_score(
    predicted_QS: NDArray[np.float64], nll_SRQ: NDArray[np.float64], *, resamples: int, confidence: float, seed: int
) -> Score:
    """LDS of one method, with a percentile interval under resampling of subsets and queries, both at once.

    The claim is about other subsets of the pool and other queries of the kind. Queries alone would leave out the larger
    part: with S subsets a score that says nothing has a Spearman of ±1/√(S − 1) on every query, and as one training
    moves all queries alike, the same sign on most of them. The draws depend on ``seed``, S and Q alone, so all methods
    are held against the same resamples.

    Args:
        predicted_QS: :func:`predictions` of the method.
        nll_SRQ: negative log-likelihood per token after training on each subset with each of R seeds.
        resamples: how many.
        confidence: mass of the interval.
        seed: of the resamples.
    """
    outcome_QS = -nll_SRQ.mean(axis=1).T
    queries, subsets = outcome_QS.shape
    random = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for row in range(resamples):
        of_Q, of_S = random.integers(0, queries, queries), random.integers(0, subsets, subsets)
        places = np.ix_(of_Q, of_S)
        drawn[row] = spearman(predicted_QS[places], outcome_QS[places]).mean()
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail))
    return Score(float(spearman(predicted_QS, outcome_QS).mean()), float(low), float(high))


@dataclass(frozen=True)
class Noise:
    """How far the seeds of the training blur the order of the subsets."""

    nll: float
    """Mean over everything, in nats a token."""
    between: float
    """Standard deviation over the subsets of a query's mean over the seeds, in nats a token (root mean square over the
    queries)."""
    within: float | None
    """The same over the seeds of a subset; None with one seed."""
    reliability: float | None
    """Share of the variance of the ranks that is the subsets' and not the seeds': the Spearman correlation between two
    seeds, mean over their pairs and over the queries, stepped up to the mean of all R by Spearman and Brown,
    R·r / (1 + (R − 1)·r)."""

    @property
    def ceiling(self) -> float | None:
        """√reliability: about what a method reaches that foretells the mean over infinitely many seeds exactly."""
        return None if self.reliability is None else math.sqrt(max(self.reliability, 0.0))


def noise(nll_SRQ: NDArray[np.float64]) -> Noise:
    """What the seeds leave of the differences between the subsets."""
    seeds = nll_SRQ.shape[1]
    between = float(np.sqrt(nll_SRQ.mean(axis=1).var(axis=0, ddof=1).mean()))
    if seeds == 1:
        return Noise(float(nll_SRQ.mean()), between, None, None)
    within = float(np.sqrt(nll_SRQ.var(axis=1, ddof=1).mean()))
    agreement = np.mean([spearman(nll_SRQ[:, one].T, nll_SRQ[:, other].T).mean()
                         for one, other in itertools.combinations(range(seeds), 2)])  # fmt: skip
    return Noise(float(nll_SRQ.mean()), between, within, float(seeds * agreement / (1 + (seeds - 1) * agreement)))


def read_scores(pool: Path, scored: Path) -> NDArray[np.float64]:
    """A method's scores (Q, N), queries and documents in the order of their ids; the one ranking of a method that looks
    at no query stands for every query.

    Args:
        pool: directory with ``pool.parquet`` and ``queries.parquet``.
        scored: directory with ``scores.parquet`` and, for a method that looks at queries, ``per_query.parquet``.

    Raises:
        InputError: they are no scores of this pool.
    """
    import pyarrow.parquet as pq

    file = pool / "pool.parquet"
    documents = read_pool(file).sort_by("doc_id")
    queries = pq.read_metadata(pool / "queries.parquet").num_rows
    if (scored / "per_query.parquet").is_file():
        return read_per_query(scored / "per_query.parquet", queries, documents["doc_id"])
    ranking = read_ranking(scored / "scores.parquet", documents, file).sort_by("doc_id")
    return np.tile(ranking["score"].to_numpy().astype(np.float64), (queries, 1))
