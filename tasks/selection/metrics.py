"""Purity, auPRC and auROC of a ranking with bootstrap intervals, and the paper's per-query metric.

The ledger computes the values in SQL over stored rows (:mod:`tasks.selection.ledger`); here are the intervals, which
need resampling, and the same values in numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.common.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

KS = (5, 10, 25, 50)
"""The Ks of the per-query metric on Brain Rot (Table 34)."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of one ranking; nan where one is not defined (no labelled document, or one class only)."""

    purity: tuple[float, ...]
    """Share of positive documents among the labelled ones of the first k, one value a k."""
    auprc: float
    """Average precision over the whole ranking."""
    auroc: float
    """Area under the ROC curve over the whole ranking."""


@dataclass(frozen=True)
class Intervals:
    """Percentile intervals (low, high) of :class:`Statistics`; nan where a statistic is not defined."""

    purity: tuple[tuple[float, float], ...]
    auprc: tuple[float, float]
    auroc: tuple[float, float]


def statistics(scores: NDArray[np.float64], positive: NDArray[np.float64], ks: Sequence[int] = ()) -> Statistics:
    """Purity at ``ks``, auPRC and auROC of one ranking.

    Args:
        scores: (N,), higher is better, finite.
        positive: (N,) 1 for a positive document, 0 for another, nan for one without a label.
        ks: how many documents are taken, each 1 to N.

    Documents with equal scores count as one step of the curves, so their order says nothing (scikit-learn's
    ``average_precision_score`` and ``roc_auc_score``). Only the cut at k has to break ties: by position, so give the
    documents in order of their ids.
    """
    import numpy as np

    ranking = _Ranking(scores, positive, ks)
    return ranking.statistics(np.ones(len(scores)))


def bootstrap(
    scores: NDArray[np.float64],
    positive: NDArray[np.float64],
    ks: Sequence[int],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> Intervals:
    """Percentile intervals under resampling of the documents with replacement.

    Args are those of :func:`statistics`. The resamples depend on ``seed`` and N alone, so the arms of a study are
    compared on the same resampled pools. A resample in which a statistic is not defined is left out of its interval.
    """
    import numpy as np

    ranking = _Ranking(scores, positive, ks)
    random = np.random.default_rng(seed)
    size = len(scores)
    draws = np.empty((resamples, len(ks) + 2))
    for row in range(resamples):
        counts = np.bincount(random.integers(0, size, size), minlength=size)
        drawn = ranking.statistics(counts.astype(np.float64))
        draws[row] = (*drawn.purity, drawn.auprc, drawn.auroc)
    tail = (1 - confidence) / 2
    bounds = [_interval(column, tail) for column in draws.T]
    return Intervals(tuple(bounds[:-2]), bounds[-2], bounds[-1])


def _interval(values: NDArray[np.float64], tail: float) -> tuple[float, float]:
    import numpy as np

    defined = values[~np.isnan(values)]
    if not defined.size:
        return (float("nan"), float("nan"))
    low, high = np.quantile(defined, (tail, 1 - tail))
    return (float(low), float(high))


class _Ranking:
    """Documents sorted once by score, ready for the statistics of any weighting of them."""

    def __init__(self, scores: NDArray[np.float64], positive: NDArray[np.float64], ks: Sequence[int]) -> None:
        import numpy as np

        self._order = np.argsort(-scores, kind="stable")
        ordered = scores[self._order]
        self._ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # last place of every tie
        self._labelled = (~np.isnan(positive[self._order])).astype(np.float64)
        self._positive = np.nan_to_num(positive[self._order])
        self._ks = np.asarray(ks, dtype=np.float64)

    def statistics(self, weights: NDArray[np.float64]) -> Statistics:
        """Statistics when document i is there ``weights[i]`` times; weights are whole numbers that add up to N."""
        import numpy as np

        weights = weights[self._order]
        seen = np.cumsum(weights)
        labelled = np.cumsum(weights * self._labelled)
        hits = np.cumsum(weights * self._positive)
        last = np.searchsorted(seen, self._ks)  # the document that the cut at k falls on; its surplus goes back
        surplus = seen[last] - self._ks
        purity = _ratio(hits[last] - surplus * self._positive[last], labelled[last] - surplus * self._labelled[last])

        true, judged = hits[self._ends], labelled[self._ends]
        positives, negatives = true[-1], judged[-1] - true[-1]
        step = np.diff(true, prepend=0.0)
        auprc = _ratio(np.sum(step * _ratio(true, judged, empty=0.0)), positives)
        false = judged - true
        # Every step of the ROC curve is a trapezium, which gives a positive half of the negatives it is tied with.
        area = np.sum(step * (negatives - (false + np.append(0.0, false[:-1])) / 2))
        auroc = _ratio(area, positives * negatives)
        return Statistics(tuple(purity.tolist()), float(auprc), float(auroc))


def _ratio(above: ArrayLike, below: ArrayLike, *, empty: float = float("nan")) -> NDArray[np.float64]:
    """Elementwise quotient, ``empty`` where ``below`` is nought."""
    import numpy as np

    out: NDArray[np.float64] = np.full(np.shape(above), empty)
    np.divide(above, below, out=out, where=np.asarray(below) != 0)
    return out


@dataclass(frozen=True)
class PerQuery:
    """The paper's retrieval metric (section 3.1): means over queries, then over Ks."""

    auprc: float
    auroc: float
    auprc_at: dict[int, float]
    """K → mean over queries."""
    auroc_at: dict[int, float]
    """K → mean over queries."""
    queries_at: dict[int, int]
    """K → queries whose 2K candidates hold both classes; the others say nothing and are left out."""


def per_query_metrics(
    scores_QN: NDArray[np.float64], labels_N: NDArray[np.bool_], ks: Sequence[int] = KS
) -> PerQuery:
    """auPRC and auROC on the K highest- and K lowest-scored candidates of every query (section 3.1, Table 34).

    Args:
        scores_QN: (queries, candidates), higher is better; candidates in order of their ids, which breaks ties.
        labels_N: (candidates,), True for what the queries look for.
        ks: the Ks that are averaged over; 5, 10, 50 and 100 for Howdy and Finance–Medical.

    A query whose 2K candidates are all positive or all negative has no auROC. It is left out of both means: the
    paper's figures for a method near chance (ZO-Inf, auPRC .33 at K = 5 with 10 % positives) agree with that and not
    with counting it as nought (.21).

    Raises:
        InputError: fewer than 2K candidates, a score that is no number, or a K at which no query holds both classes.
    """
    import numpy as np

    scores_QN = np.asarray(scores_QN, dtype=np.float64)
    queries, candidates = scores_QN.shape
    if labels_N.shape != (candidates,):
        raise InputError(f"{candidates} candidates are scored, and {labels_N.size} have a label")
    if not np.isfinite(scores_QN).all():
        raise InputError("a score of a query is not a finite number; score the pool again")
    positive = labels_N.astype(np.float64)
    order_QN = np.argsort(-scores_QN, axis=1, kind="stable")
    auprc_at, auroc_at, queries_at = {}, {}, {}
    for k in ks:
        if 2 * k > candidates:
            raise InputError(f"the metric at K = {k} needs {2 * k} candidates, and there are {candidates}")
        values = []
        for query in range(queries):
            chosen = np.concatenate((order_QN[query, :k], order_QN[query, -k:]))
            found = statistics(scores_QN[query, chosen], positive[chosen])
            if not np.isnan(found.auroc):
                values.append((found.auprc, found.auroc))
        if not values:
            raise InputError(f"at K = {k} no query has both positive and negative candidates")
        queries_at[k] = len(values)
        auprc_at[k], auroc_at[k] = np.mean(values, axis=0).tolist()
    return PerQuery(
        float(np.mean(list(auprc_at.values()))), float(np.mean(list(auroc_at.values()))),
        auprc_at, auroc_at, queries_at,
    )  # fmt: skip
