"""How widely a document's scores scatter over the pool: the unit that standardised scores are given in.

A document that resembles many others (long, or of a common kind) scores high or low with every query alike, by chance
too; one that resembles none hardly moves. Divided by the spread of its scores with the pool, a score says how far a
query stands out among all that the document was compared with. Like a calibration it sees no label and no query, and a
score of 0 stays 0: where the queries say nothing, nothing is added.

The spread is the distance from the median of these scores down to their 10th percentile. The upper side is where a
document's own kind lies, a few documents or a tenth of the pool, and says nothing of chance: a standard deviation takes
a whole kind down with it (reports/LOG.md).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.common.files import intact
from tasks.scoring import index
from tasks.scoring.bits import Agreement, Codes, pack
from tasks.scoring.calibration import Fitted, Signatures
from tasks.scoring.config import FitConfig, IndexType
from tasks.scoring.index import Shard

REFERENCE = 1000
"""Documents of the pool that a spread is taken over."""
_QUANTILE, _ROWS = 0.1, 1024


def sample(doc_ids: Sequence[str], count: int, seed: int = 42) -> list[int]:
    """Places of the ``count`` documents whose hashed ids come first, in order of place."""
    hashed = ((hashlib.sha256(f"{seed}/{doc_id}".encode()).digest(), place) for place, doc_id in enumerate(doc_ids))
    return sorted(place for _, place in heapq.nsmallest(count, hashed))


class Spread:
    """Spread of documents' scores over the documents of a reference.

    Args:
        reference: calibrated signatures (R, D) as floats, or packed bits (R, B).
        dimension: D, for bits.
    """

    def __init__(self, reference: Signatures | Codes, *, dimension: int | None = None) -> None:
        self._reference_DR = np.ascontiguousarray(reference.T) if dimension is None else None
        self._agreement = None if dimension is None else Agreement(reference.astype(np.uint8, copy=False), dimension)
        self._dimension = dimension or 1

    def __call__(self, block: NDArray[Any]) -> NDArray[np.float32]:
        """Spreads (n,) of documents; 1 where all scores are equal.

        Args:
            block: calibrated signatures (n, D), or packed bits (n, B).
        """
        score_NR = block @ self._reference_DR if self._agreement is None else self._agreement(block) / self._dimension
        low_N, middle_N = np.quantile(score_NR, (_QUANTILE, 0.5), axis=1)
        spread_N = middle_N - low_N
        return np.where(spread_N < 1e-9, 1.0, spread_N).astype(np.float32)


def write_spreads(directory: Path, numbers: Iterable[int], stored: IndexType, dimension: int, fit: FitConfig) -> None:
    """Keep the spreads of the documents of some whole shards of an index, those that lack them.

    The reference is drawn from these shards, by the hashed ids, where the index has none yet: an append compares with
    the documents that the index was built of.
    """
    shards = [index.written_shard(directory, number, stored, dimension) for number in numbers]
    fitted = index.read_calibration(directory, fit.name)
    if not intact(directory / index.REFERENCE):
        index.write_reference(directory, _reference(shards, fitted, fit.seed))
    reference = np.load(directory / index.REFERENCE, allow_pickle=False)
    bits = stored == "bit"
    spread = Spread(reference if bits else reference.astype(np.float32), dimension=dimension if bits else None)
    for shard in shards:
        if not index.has_spread(directory, shard.number):
            rows = [slice(start, start + _ROWS) for start in range(0, len(shard), _ROWS)]
            index.add_spread(directory, shard.number, np.concatenate([
                spread(shard.arrays()["signatures"][some] if bits else fitted.apply(shard.signatures(some)))
                for some in rows
            ]))  # fmt: skip


def _reference(shards: Sequence[Shard], fitted: Fitted, seed: int) -> NDArray[Any]:
    """Packed bits, or calibrated signatures as fp16, of the sample; without those that are zero."""
    ids = [doc_id for shard in shards for doc_id in shard.doc_ids().to_pylist()]
    starts = np.cumsum([0, *map(len, shards)])
    kept = []
    for place in sample(ids, REFERENCE, seed):
        number = int(np.searchsorted(starts, place, side="right")) - 1
        row = slice(place - int(starts[number]), place - int(starts[number]) + 1)
        phi_1D = shards[number].signatures(row)
        if shards[number].stored != "bit":
            phi_1D = fitted.apply(phi_1D)
        if phi_1D.any():
            kept.append(pack(phi_1D > 0) if shards[number].stored == "bit" else phi_1D.astype(np.float16))
    return np.concatenate(kept)
