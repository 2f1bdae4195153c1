"""Cosine of features, plain or calibrated as RISE's signatures are, and the files that features stand in.

Shape suffixes beside those of :mod:`tasks.scoring`: F coordinates of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.common.files import intact, whole_file
from tasks.common.progress import Progress, Report
from tasks.scoring.calibration import MEDIAN_BIT, empty, fit
from tasks.scoring.config import SPREAD, FitConfig
from tasks.scoring.index import begin
from tasks.scoring.spread import REFERENCE, Spread

Features = NDArray[Any] | Sequence[NDArray[Any]]
"""Features (N, F) of any float type, mapped or in memory, in one array or in several that follow each other."""
Make = Callable[[range, Callable[[int], None]], NDArray[Any]]
"""Makes the rows of a range; tells the callable the amount of work done."""

_BLOCK_BYTES = 32 << 20
"""Memory of one block of float32 features."""


def cosine_scores(pool: Features, queries: NDArray[Any], calibration: str) -> NDArray[np.float32]:
    """Cosine of every document for every query, (Q, N).

    Both sides are brought to unit length, as signatures are, then calibrated by what the pool alone says, then
    compared. A zero feature has the cosine 0. The pool is read a block of rows at a time; ``median-bit`` is fitted on
    as many rows as :class:`FitConfig` says, evenly spread.

    Args:
        pool: features (N, F).
        queries: features (Q, F).
        calibration: none, center, power:P or median-bit, each also with +spread (``CALIBRATION_PATTERN``).

    Raises:
        InputError: no document has a feature to fit a calibration on.
    """
    parts = [pool] if isinstance(pool, np.ndarray) else pool
    base = calibration.removesuffix(SPREAD)
    sampled = _some(parts, _evenly(parts, FitConfig().documents))
    fitted = fit(base, sampled if base == MEDIAN_BIT else _blocks(parts))
    query_QF = fitted.apply(unit(queries))
    spread = None
    if calibration.endswith(SPREAD):
        reference_RF = fitted.apply(np.concatenate(list(_some(parts, _evenly(parts, REFERENCE)))))
        spread = Spread(reference_RF[~empty(reference_RF)])
    scores = []
    for block in _blocks(parts):
        feature_NF = fitted.apply(block)
        score_QN = query_QF @ feature_NF.T
        scores.append(score_QN if spread is None else score_QN / spread(feature_NF))
    return np.concatenate(scores, axis=1)


def unit(features: NDArray[Any]) -> NDArray[np.float32]:
    """Rows at unit length, float32; a zero row stays zero."""
    feature_NF = np.asarray(features, dtype=np.float32)
    norm = np.linalg.norm(feature_NF, axis=1, keepdims=True)
    norm[norm == 0] = 1.0
    scaled: NDArray[np.float32] = feature_NF / norm
    return scaled


def _blocks(parts: Sequence[NDArray[Any]]) -> Iterator[NDArray[np.float32]]:
    for part in parts:
        rows = max(1, _BLOCK_BYTES // (4 * part.shape[1]))
        for start in range(0, len(part), rows):
            yield unit(part[start : start + rows])


def _evenly(parts: Sequence[NDArray[Any]], count: int) -> NDArray[np.int64]:
    """Places of ``count`` rows at equal distances over all parts, or of all rows where there are fewer."""
    total = sum(map(len, parts))
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))


def _some(parts: Sequence[NDArray[Any]], places: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    """Rows at some places, a part at a time."""
    start = 0
    for part in parts:
        yield unit(part[places[(places >= start) & (places < start + len(part))] - start])
        start += len(part)


def kept(
    directory: Path, identity: Mapping[str, Any], plan: Sequence[tuple[range, int]], make: Make, *, label: str,
    unit: str, report: Report | None = None,
) -> list[NDArray[Any]]:  # fmt: skip
    """Features on disk, mapped: ``directory/NNNNN.npy`` for each range of a plan, whole or absent.

    What stands is not made again, so a killed call goes on at the range it was at.

    Args:
        directory: where they stand.
        identity: all that decides their bytes, as JSON types.
        plan: ranges of rows, each with its amount of work.
        make: makes the rows of a range.
        label: shown beside the progress bar.
        unit: what the amount of work counts.
        report: told the share done.

    Raises:
        InputError: the directory holds features of another identity, or the disk is full.
    """
    begin(directory, identity)
    files = [directory / f"{number:05d}.npy" for number in range(len(plan))]
    missing = [(file, *one) for file, one in zip(files, plan, strict=True) if not intact(file)]
    total = sum(amount for _, amount in plan)
    done = total - sum(amount for _, _, amount in missing)
    with Progress(label, total, unit, done=done, report=report) as progress:
        for file, places, _ in missing:
            made = make(places, progress.add)
            with whole_file(file, noted=True) as part, part.open("wb") as opened:
                np.save(opened, made, allow_pickle=False)
    return [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
