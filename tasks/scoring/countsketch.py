"""CountSketch (Eq. 17) and a sparse projection, both fixed by a seed alone."""

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


def _bits(name: str, count: int) -> NDArray[np.uint64]:
    """64 bits for each of the numbers 1 to ``count``, all different."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    step = np.uint64(0x9E3779B97F4A7C15)
    return _splitmix64(np.uint64(start) + step * np.arange(1, count + 1, dtype=np.uint64))


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
        bits = _bits(f"countsketch/{family}/{seed}", dimension)
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


def sparse_projection(dimension: int, width: int, *, seed: int, family: str, terms: int = 4) -> NDArray[np.float32]:
    """Matrix P (D, K) whose columns have ``terms`` entries ±1/√terms: K signed sums of a few coordinates each.

    Unlike a CountSketch it may be wider than the vector, which gives the sign of each number something to say of its
    own; unlike a dense projection the few large coordinates of a hidden state reach few of its numbers. Every
    coordinate is read equally often, give or take one for each term. Two of a column's entries may fall together.

    Args:
        dimension: D, length of the vectors.
        width: K, numbers that are made of one.
        seed: the run's seed.
        family: name of what is projected.
        terms: entries a column.
    """
    matrix = np.zeros((dimension, width), dtype=np.float32)
    rounds, columns = -(-width // dimension), np.arange(width)
    for term in range(terms):
        keys = _bits(f"projection/{family}/{seed}/{term}", rounds * dimension).reshape(rounds, dimension)
        rows = np.argsort(keys, axis=1, kind="stable").ravel()[:width]
        signs = 1.0 - 2.0 * (_bits(f"signs/{family}/{seed}/{term}", width) & np.uint64(1)).astype(np.float32)
        matrix[rows, columns] += signs / np.sqrt(np.float32(terms))
    return matrix
