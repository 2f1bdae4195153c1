"""Stage 3 of Algorithm 1: scores of all documents, mean-pooled over the queries and per query; or the best N alone."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.scoring import calibration
from tasks.scoring.bits import Agreement, pack, planes
from tasks.scoring.calibration import Fitted, MedianBit, Signatures
from tasks.scoring.config import CALIBRATION_PATTERN, SPREAD, FitConfig, SketchConfig, check_type
from tasks.scoring.index import Index, Shard
from tasks.scoring.spread import REFERENCE, Spread, sample


@dataclass(frozen=True)
class Scores:
    """Scores of N documents for Q queries; higher is more influential."""

    doc_ids: list[str]
    mean: NDArray[np.float64]
    """(N,): what the ranking is made from."""
    query_ids: list[str]
    per_query: NDArray[np.float32] | None
    """(Q, N); None for a method that does not look at the queries."""


@dataclass(frozen=True)
class Hit:
    """A document that was found."""

    doc_id: str
    score: float
    place: int
    """Where its signature stands in the index."""


def score(pool: Index, queries: Index, *, calibrated: str = "none", first: int = 0) -> Scores:
    """score(x_i) = φ(x_i)ᵀ φ̄_Q (Algorithm 1), with both sides calibrated by what the pool alone says.

    Args:
        pool: signatures of the documents, of any type.
        queries: signatures of the queries, not calibrated (any type but ``bit``).
        calibrated: name of the calibration; the one that the index keeps is used as it is, another is fitted here.
            With ``+spread`` a document's scores are divided by their spread (:mod:`tasks.scoring.spread`).
        first: place of the first document that is scored, where a shard begins; those before it are not read where
            the index keeps the calibration.

    Raises:
        InputError: the calibration does not go with the pool's type.
        ValueError: no shard begins at ``first``, or none is left.
    """
    if first not in pool.starts[:-1]:
        raise ValueError(f"no shard begins at document {first}")
    shards = pool.shards[int(np.searchsorted(pool.starts, first)) :]
    doc_ids = [doc_id for shard in shards for doc_id in shard.doc_ids().to_pylist()] if first else pool.doc_ids
    standardize = calibrated.endswith(SPREAD)
    own = calibrated == pool.calibration_name
    fitted = pool.calibration if own else fitted_for(pool, calibrated.removesuffix(SPREAD))
    query_QD = np.concatenate(list(queries.blocks()))
    if pool.stored == "bit":
        assert isinstance(fitted, MedianBit)  # check_type saw to it
        per_query, mean = _score_bits(pool, shards, query_QD, fitted, standardize, own)
        return Scores(doc_ids, mean, queries.doc_ids, per_query)
    query_QD = fitted.apply(query_QD)
    pooled_D = query_QD.mean(axis=0, dtype=np.float64)
    spread = _spread(pool, fitted) if standardize and not own else None
    products: list[NDArray[np.float32]] = []
    means: list[NDArray[np.float64]] = []
    for shard in shards:
        for start in range(0, len(shard), _ROWS):
            rows = slice(start, start + _ROWS)
            phi_ND = fitted.apply(shard.signatures(rows))
            unit_N = _unit(shard, rows, phi_ND, spread, kept=standardize and own)
            products.append(query_QD @ phi_ND.T / unit_N)
            means.append(phi_ND.astype(np.float64) @ pooled_D / unit_N)
    return Scores(doc_ids, np.concatenate(means), queries.doc_ids, np.concatenate(products, axis=1))


def _spread(pool: Index, fitted: Fitted) -> Spread:
    """The spread over a sample of an index that does not keep it."""
    reference_RD = pool.signatures(sample(pool.doc_ids, REFERENCE))
    if pool.stored == "bit":
        return Spread(pack(reference_RD[~calibration.empty(reference_RD)] > 0), dimension=pool.dimension)
    reference_RD = fitted.apply(reference_RD)
    return Spread(reference_RD[~calibration.empty(reference_RD)])


def _unit(
    shard: Shard, rows: slice, block: NDArray[Any], spread: Spread | None, *, kept: bool
) -> NDArray[np.float32]:
    """What the scores of some rows are divided by, (n,) or (1,): spreads that the index keeps or that are made now."""
    if kept:
        return shard.spread(rows)
    return np.ones(1, dtype=np.float32) if spread is None else spread(block)


def fitted_for(pool: Index, calibrated: str) -> Fitted:
    """The calibration of this name: the one that the index keeps, or one fitted on its signatures.

    Raises:
        InputError: it does not go with the index's type.
    """
    if not re.fullmatch(CALIBRATION_PATTERN, calibrated):
        raise InputError(f"there is no calibration {calibrated!r}; there are none, center, power:P and median-bit, "
                         "each also with +spread")  # fmt: skip
    try:
        check_type(pool.stored, calibrated)
    except ValueError as error:
        raise InputError(str(error), file=pool.directory) from None
    if calibrated == pool.calibration_name:
        return pool.calibration
    if calibrated.endswith(SPREAD):
        raise InputError(f"keeps no spreads, which {calibrated} needs: build or convert it with that calibration",
                         file=pool.directory)  # fmt: skip
    if calibrated == calibration.MEDIAN_BIT:  # needs its signatures in memory
        drawn = FitConfig()
        return calibration.fit(calibrated, [pool.signatures(sample(pool.doc_ids, drawn.documents, drawn.seed))])
    return calibration.fit(calibrated, pool.blocks())


def _score_bits(
    pool: Index, shards: Sequence[Shard], query_QD: Signatures, fitted: MedianBit, standardize: bool, own: bool
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Scores (Q, N) and their mean (N,)."""
    agreement = _bits(query_QD, fitted)
    spread = _spread(pool, fitted) if standardize and not own else None
    products: list[NDArray[np.float32]] = []
    means: list[NDArray[np.float64]] = []
    for shard in shards:
        for start in range(0, len(shard), _ROWS):
            rows = slice(start, start + _ROWS)
            whole_NQ = agreement(shard, rows)
            unit_N = _unit(shard, rows, shard.arrays()["signatures"][rows], spread, kept=standardize and own)
            products.append((whole_NQ.T / (pool.dimension * unit_N)).astype(np.float32))
            means.append(whole_NQ.sum(axis=1) / (pool.dimension * len(query_QD) * unit_N))
    return np.concatenate(products, axis=1), np.concatenate(means)


def mean_pooled(index: Index, query_QD: Signatures, top: int, *, fitted: Fitted | None = None) -> list[Hit]:
    """The ``top`` documents with the highest mean score over the queries; ties by id. As :func:`score`, streamed.

    Scores are standardised where the index keeps its documents' spreads and its own calibration is taken.

    Args:
        index: signatures of the documents, of any type.
        query_QD: signatures of the queries (Q, D), not calibrated.
        top: how many documents.
        fitted: calibration of both sides; None takes the index's own.

    Raises:
        InputError: a file of the index has changed.
    """
    scale, fitted = _scale(index, fitted), _own(index, fitted)
    if isinstance(fitted, MedianBit) and index.stored == "bit":
        return _best(index, scale(_pooled_bits(query_QD, fitted)), 1, top, index.dimension * len(query_QD))[0]
    pooled_D1 = fitted.apply(query_QD).mean(axis=0, dtype=np.float64)[:, None]
    return _best(index, scale(_floats(pooled_D1, fitted)), 1, top)[0]


def per_query(index: Index, query_QD: Signatures, top: int, *, fitted: Fitted | None = None) -> list[list[Hit]]:
    """For each query the ``top`` documents with the highest score; as :func:`mean_pooled`."""
    scale, fitted = _scale(index, fitted), _own(index, fitted)
    if isinstance(fitted, MedianBit) and index.stored == "bit":
        return _best(index, scale(_bits(query_QD, fitted)), len(query_QD), top, index.dimension)
    return _best(index, scale(_floats(fitted.apply(query_QD).T, fitted)), len(query_QD), top)


def channels(
    index: Index, query_QD: Signatures, hits: list[Hit], *, fitted: Fitted | None = None
) -> NDArray[np.float64]:
    """The parts of the mean-pooled scores of some documents that come from RH, GH and MH, (N, 3).

    The parts of a calibrated score: they sum to it.
    """
    scaled = _standardizes(index, fitted)
    fitted = _own(index, fitted)
    phi_ND = index.signatures([hit.place for hit in hits])
    phi_ND = phi_ND if index.stored == "bit" else fitted.apply(phi_ND)  # bits are calibrated as they stand
    pooled_D = fitted.apply(query_QD).mean(axis=0, dtype=np.float64)
    sketch = SketchConfig(**index.manifest["sketch"])
    product_ND = phi_ND * pooled_D
    parts_N3 = np.stack([part.sum(axis=1) for part in np.split(product_ND, sketch.cuts, axis=1)], axis=1)
    return parts_N3 / index.spreads([hit.place for hit in hits])[:, None] if scaled else parts_N3


def _own(index: Index, fitted: Fitted | None) -> Fitted:
    """The index's calibration where none is given; one that is given must go with the type."""
    if fitted is not None and index.stored == "bit" and not isinstance(fitted, MedianBit):
        raise ValueError(f"a calibration that does not go with the type {index.stored}")
    return index.calibration if fitted is None else fitted


def _standardizes(index: Index, fitted: Fitted | None) -> bool:
    """Whether the index keeps spreads, and those of the calibration that is taken."""
    return index.standardizes and (fitted is None or fitted is index.calibration)


_Judge = Callable[[Shard, slice], NDArray[Any]]
"""Values (n, Q) of some rows of a shard, the higher the better."""


def _scale(index: Index, fitted: Fitted | None) -> Callable[[_Judge], _Judge]:
    """Divides what a judge says by the spreads, where they are to be used."""
    if not _standardizes(index, fitted):
        return lambda judge: judge
    return lambda judge: lambda shard, rows: judge(shard, rows) / shard.spread(rows)[:, None]


def _floats(query_DQ: NDArray[Any], fitted: Fitted) -> _Judge:
    def judge(shard: Shard, rows: slice) -> NDArray[Any]:
        return fitted.apply(shard.signatures(rows)).astype(query_DQ.dtype, copy=False) @ query_DQ

    return judge


def _bits(query_QD: Signatures, fitted: MedianBit) -> _Judge:
    """D times the cosine of the signs, (n, Q) whole numbers."""
    agreement = Agreement(pack(fitted.bits(query_QD)), query_QD.shape[1])
    silent = calibration.empty(query_QD)

    def judge(shard: Shard, rows: slice) -> NDArray[np.int32]:
        value_NQ = agreement(shard.arrays()["signatures"][rows])
        value_NQ[:, silent] = 0
        return shard.without_empty(value_NQ, rows)

    return judge


def _pooled_bits(query_QD: Signatures, fitted: MedianBit) -> _Judge:
    """The sum of :func:`_bits` over the queries, (n, 1), from a few bit planes."""
    speaking = query_QD[~calibration.empty(query_QD)]
    if not len(speaking):
        return lambda shard, rows: np.zeros((len(range(*rows.indices(len(shard)))), 1))
    plane_PB, weight_P = planes(pack(fitted.bits(speaking)), query_QD.shape[1])
    agreement = Agreement(plane_PB, query_QD.shape[1])
    # float64 keeps these whole numbers exactly and has a fast product.
    weight_P1 = weight_P.astype(np.float64)[:, None]

    def judge(shard: Shard, rows: slice) -> NDArray[np.float64]:
        return shard.without_empty(agreement(shard.arrays()["signatures"][rows]) @ weight_P1, rows)

    return judge


def _best(index: Index, judge: _Judge, queries: int, top: int, divisor: float = 1.0) -> list[list[Hit]]:
    """Stream over the index, a thread a core, a block of rows at a time."""
    wide = index.dimension * 4 if index.stored != "bit" else 0
    rows = int(np.clip(_BLOCK_BYTES // max(wide, 4 * queries, 1), 64, 16_384))
    best = _Best(index, queries, top)
    threads = len(os.sched_getaffinity(0))

    def look(shard: Shard, start: int) -> _Found:
        values = judge(shard, slice(start, start + rows))
        return best.select(values, int(index.starts[shard.number]) + start)

    with ThreadPoolExecutor(threads) as workers:
        ahead: deque[Future[_Found]] = deque()
        for shard in index.shards:
            for start in range(0, len(shard), rows):
                ahead.append(workers.submit(look, shard, start))
                if len(ahead) > 2 * threads:
                    best.add(ahead.popleft().result())
        while ahead:
            best.add(ahead.popleft().result())
    return best.hits(divisor)


_ROWS = 4096
"""Documents that :func:`score` looks at at a time."""
_BLOCK_BYTES = 32 << 20
"""Memory of a block's decoded signatures or values, whichever is more."""
_Found = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]
"""Queries, places and values of some candidates."""


class _Best:
    """The best ``top`` documents of each query so far, with those that tie with the last of them.

    Ids are looked up for the survivors alone; where ties pile up, they are settled by id on the way, so that memory
    stays bounded whatever the values are.
    """

    def __init__(self, index: Index, queries: int, top: int) -> None:
        self._index, self._queries, self._top = index, queries, top
        self._limit = 8 * queries * top + 4096
        self._found: list[_Found] = []
        self._count = 0
        self._floor: NDArray[Any] | None = None
        """The lowest value that can still be among the best, for each query."""

    def select(self, value_NQ: NDArray[Any], first: int) -> _Found:
        """Those of a block that can be among the best; ``first`` is the place of its first row."""
        floor = self._floor
        if floor is None:
            last = max(len(value_NQ) - self._top, 0)
            floor = np.partition(value_NQ, last, axis=0)[last]
        row, query = np.nonzero(value_NQ >= floor)
        return query, row + first, value_NQ[row, query]

    def add(self, found: _Found) -> None:
        """Take in what :meth:`select` found."""
        self._found.append(found)
        self._count += len(found[0])
        if self._floor is None or self._count > self._limit:
            self._cut()
            if self._count > self._limit // 2:
                self._settle()

    def hits(self, divisor: float) -> list[list[Hit]]:
        """The best of each query: highest value first, ties by id; a score is a value over ``divisor``."""
        self._cut()
        ranked = self._settle()
        return [[Hit(doc_id, value / divisor, place) for value, doc_id, place in some] for some in ranked]

    def _cut(self) -> None:
        """Keep what is not below the last of its query's best."""
        query, place, value = self._joined()
        order = np.lexsort((-value, query))
        query, place, value = query[order], place[order], value[order]
        starts = np.searchsorted(query, np.arange(self._queries + 1))
        if (np.diff(starts) >= self._top).all():
            self._floor = value[starts[:-1] + self._top - 1]
            kept = value >= self._floor[query]
            query, place, value = query[kept], place[kept], value[kept]
        self._keep(query, place, value)

    def _settle(self) -> list[list[tuple[Any, str, int]]]:
        """Keep the best of each query, ties settled by id; value, id and place of each, in order."""
        query, place, value = self._joined()
        found: list[list[tuple[Any, str, int]]] = [[] for _ in range(self._queries)]
        named = zip(value.tolist(), self._index.ids(place), place.tolist(), strict=True)
        for number, entry in zip(query.tolist(), named, strict=True):
            found[number].append(entry)
        best = [sorted(some, key=lambda entry: (-entry[0], entry[1]))[: self._top] for some in found]
        kept = np.array([(number, entry[2]) for number, some in enumerate(best) for entry in some], dtype=np.int64)
        kept = kept.reshape(-1, 2)
        values = np.array([entry[0] for some in best for entry in some], dtype=value.dtype)
        self._keep(kept[:, 0], kept[:, 1], values)
        return best

    def _joined(self) -> _Found:
        query, place, value = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        return query, place, value

    def _keep(self, query: NDArray[np.int64], place: NDArray[np.int64], value: NDArray[Any]) -> None:
        self._found, self._count = [(query, place, value)], len(query)
