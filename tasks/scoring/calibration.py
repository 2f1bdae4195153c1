"""Calibration of signatures: fitted on the pool alone, applied to pool and queries alike.

On real text one component that all documents share dominates the raw signature; taking the pool's mean off leaves
what tells documents apart. Nothing here sees a label or a query while it is fitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Signatures = NDArray[np.float32]


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


def fit(name: str, blocks: Iterable[Signatures]) -> Calibration:
    """Fit a calibration by its name (``RiseConfig.calibration``) in one pass over blocks (n, D) of the pool."""
    if name == "none":
        return Calibration(1.0, None)
    power = float(name.removeprefix("power:")) if name.startswith("power:") else 1.0
    total: NDArray[np.float64] | None = None
    count = 0
    for block in blocks:
        phi_ND = block[block.any(axis=1)]
        part = _power(phi_ND, power).sum(axis=0, dtype=np.float64)
        total = part if total is None else total + part
        count += len(phi_ND)
    if total is None or count == 0:
        raise ValueError("no signature to fit a calibration on")
    return Calibration(power, (total / count).astype(np.float32))


def _power(phi_ND: Signatures, power: float) -> Signatures:
    return phi_ND.copy() if power == 1.0 else np.sign(phi_ND) * np.abs(phi_ND) ** np.float32(power)
