"""Calibration of signatures: fitted on the pool alone, applied to pool and queries alike.

On real text one component that all documents share dominates the raw signature; taking what is common off leaves what
tells documents apart. A fit is given signatures and nothing else: no label, no query.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.common.errors import InputError

Signatures = NDArray[np.float32]

MEDIAN_BIT = "median-bit"
_NOTHING = "no document has two tokens, so there is no signature to fit a calibration on"
_COLUMNS = 512
"""Coordinates whose median is taken at once: it bounds the copy that the selection works on."""


@dataclass(frozen=True)
class Calibration:
    """x → unit(sign(x)|x|^p − mean); the identity where there is no mean.

    Use :func:`fit`.
    """

    power: float
    """p; 1 leaves the values."""
    mean: NDArray[np.float32] | None
    """Mean of the pool after the power, (D,); None for ``none``."""

    def apply(self, phi_ND: Signatures) -> Signatures:
        """Calibrated signatures (N, D), unit length; a zero signature (no position) stays zero."""
        if self.mean is None:
            return phi_ND
        empty = ~phi_ND.any(axis=1)
        calibrated = _power(phi_ND, self.power) - self.mean
        calibrated[empty] = 0.0
        norm = np.linalg.norm(calibrated, axis=1, keepdims=True)
        calibrated /= np.where(norm == 0, 1.0, norm)
        return calibrated


@dataclass(frozen=True)
class MedianBit:
    """x → sign(x − median)/√D: one bit a coordinate."""

    median: NDArray[np.float32]
    """Median of each coordinate over a sample of the pool, (D,)."""

    def bits(self, phi_ND: Signatures) -> NDArray[np.bool_]:
        """Whether each coordinate lies above the median, (N, D); a zero signature has no bits, see :func:`empty`."""
        return phi_ND > self.median

    def apply(self, phi_ND: Signatures) -> Signatures:
        """Calibrated signatures (N, D) of ±1/√D, unit length; a zero signature (no position) stays zero."""
        calibrated = signs(self.bits(phi_ND))
        calibrated[empty(phi_ND)] = 0.0
        return calibrated


Fitted = Calibration | MedianBit


def signs(bits_ND: NDArray[np.bool_]) -> Signatures:
    """Bits as ±1/√D."""
    size = np.float32(1.0 / np.sqrt(bits_ND.shape[1]))
    return np.where(bits_ND, size, -size)


def empty(phi_ND: Signatures) -> NDArray[np.bool_]:
    """Which signatures are zero: those of documents in which no position predicts a next token, (N,)."""
    nothing: NDArray[np.bool_] = ~np.any(phi_ND, axis=1)
    return nothing


def fit(name: str, blocks: Iterable[Signatures]) -> Fitted:
    """Fit a calibration by its name (``RiseConfig.calibration``) in one pass over blocks (n, D) of the pool.

    ``median-bit`` keeps what it is given in memory: give it a sample.
    """
    if name == "none":
        return Calibration(1.0, None)
    if name == MEDIAN_BIT:
        return MedianBit(_median([block[~empty(block)] for block in blocks]))
    total: NDArray[np.float64] | None = None
    count = 0
    for block in blocks:
        phi_ND = block[~empty(block)]
        part = _power(phi_ND, _exponent(name)).sum(axis=0, dtype=np.float64)
        total = part if total is None else total + part
        count += len(phi_ND)
    if total is None or count == 0:
        raise InputError(_NOTHING)
    return Calibration(_exponent(name), (total / count).astype(np.float32))


def restore(name: str, center_D: NDArray[np.float32]) -> Fitted:
    """A fitted calibration from its name and what :func:`center` gave."""
    return MedianBit(center_D) if name == MEDIAN_BIT else Calibration(_exponent(name), center_D)


def center(fitted: Fitted) -> NDArray[np.float32]:
    """What a calibration learned from the pool: its mean or median, (D,); nothing, (0,), for ``none``."""
    learned = fitted.median if isinstance(fitted, MedianBit) else fitted.mean
    return np.zeros(0, dtype=np.float32) if learned is None else learned


def _median(parts: list[Signatures]) -> NDArray[np.float32]:
    if not sum(map(len, parts)):
        raise InputError(_NOTHING)
    starts = range(0, parts[0].shape[1], _COLUMNS)
    return np.concatenate([
        np.median(np.concatenate([part[:, start : start + _COLUMNS] for part in parts]), axis=0) for start in starts
    ]).astype(np.float32)  # fmt: skip


def _exponent(name: str) -> float:
    return float(name.removeprefix("power:")) if name.startswith("power:") else 1.0


def _power(phi_ND: Signatures, power: float) -> Signatures:
    return phi_ND.copy() if power == 1.0 else np.sign(phi_ND) * np.abs(phi_ND) ** np.float32(power)
