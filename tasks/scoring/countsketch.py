"""CountSketch (Eq. 17): one bucket and one sign a coordinate, fixed by a seed alone."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def _splitmix64(counter: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The SplitMix64 finaliser: a bijection on 64 bits whose output bits are close to independent."""
    mixed = (counter ^ (counter >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class CountSketch:
    """CS: R^D → R^K with CS(x)_k = Σ_{j: η(j) = k} s(j) x_j.

    The hashes come from a counter through SplitMix64, so they are the same on every machine and with every version
    of every library.

    Args:
        dimension: D, length of the vectors.
        width: K, number of buckets.
        seed: the run's seed.
        family: name of the factor (``residual``, ``hidden``, ``error``); families are independent (Appendix D.1).
    """

    def __init__(self, dimension: int, width: int, *, seed: int, family: str) -> None:
        self.dimension, self.width = dimension, width
        start = int.from_bytes(hashlib.sha256(f"countsketch/{family}/{seed}".encode()).digest()[:8], "little")
        step = np.uint64(0x9E3779B97F4A7C15)
        bits = _splitmix64(np.uint64(start) + step * np.arange(1, dimension + 1, dtype=np.uint64))
        high = bits >> np.uint64(32)
        self.bucket: NDArray[np.int64] = ((high * np.uint64(width)) >> np.uint64(32)).astype(np.int64)
        """η: (D,) in [0, K), from the high bits."""
        self.sign: NDArray[np.float32] = (1.0 - 2.0 * (bits & np.uint64(1)).astype(np.float32)).astype(np.float32)
        """s: (D,) of ±1, from the lowest bit."""

    def matrix(self) -> NDArray[np.float32]:
        """The sketch as a dense matrix (D, K), so that CS(x) = x S."""
        dense = np.zeros((self.dimension, self.width), dtype=np.float32)
        dense[np.arange(self.dimension), self.bucket] = self.sign
        return dense

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """η and s on a device, for sparse vectors."""
        import torch

        return torch.from_numpy(self.bucket).to(device), torch.from_numpy(self.sign).to(device)
