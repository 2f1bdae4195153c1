"""How the values of a signature stand on disk: floats, 8 bits on a square-root scale, or one bit.

| type | bytes a coordinate | what is kept |
|---|---|---|
| fp32 | 4 | the values |
| fp16 | 2 | the values to 11 bits |
| int8 | 1 | sign(x)√|x| to 8 bits of each document's largest |
| bit | 1/8 | on which side of the pool's median the value lies |

int8 is on a square-root scale with one float32 factor a document because a signature has many small values and a few
large ones. On 1,000 documents of real text the error is 1.2 % of a signature's length, against 2.8 % for the linear
scale of each document and 5.6 % for one linear scale of all, which loses a third of the coordinates to zero; under
``power:0.3`` the ranking stays (Spearman .999996 with fp32, against .9991 and .9978).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.scoring.bits import pack, packed_bytes, unpack
from tasks.scoring.calibration import MedianBit, Signatures, empty, signs
from tasks.scoring.config import IndexType

_FLOATS: dict[str, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16}
_LEVELS = 127


def bytes_a_document(stored: IndexType, dimension: int) -> int:
    """Bytes that a signature takes on disk, its factor included."""
    return {"fp32": 4 * dimension, "fp16": 2 * dimension, "int8": dimension + 4, "bit": packed_bytes(dimension)}[stored]


def parts(stored: IndexType) -> list[str]:
    """Names of the arrays a shard keeps: ``signatures`` and, for int8, ``scales``."""
    return ["signatures", "scales"] if stored == "int8" else ["signatures"]


class Encoder:
    """The arrays of a shard, filled a few signatures at a time: the float32 ones never stand all at once.

    Args:
        rows: documents of the shard.
        stored: type.
        fitted: the median, for ``bit``.
    """

    def __init__(self, rows: int, stored: IndexType, fitted: MedianBit | None = None) -> None:
        self._rows, self._stored, self._fitted, self._filled = rows, stored, fitted, 0
        self.arrays: dict[str, NDArray[Any]] = {}
        self.empty: list[int] = []
        """Rows whose signature is zero, where the type cannot say so: a bit is one or the other."""

    def add(self, phi_ND: Signatures) -> None:
        """Encode the next signatures."""
        rows = slice(self._filled, self._filled + len(phi_ND))
        for name, part in encode(phi_ND, self._stored, self._fitted).items():
            if name not in self.arrays:
                self.arrays[name] = np.empty((self._rows, *part.shape[1:]), dtype=part.dtype)
            self.arrays[name][rows] = part
        if self._stored == "bit":
            self.empty += (np.flatnonzero(empty(phi_ND)) + rows.start).tolist()
        self._filled = rows.stop


def encode(phi_ND: Signatures, stored: IndexType, fitted: MedianBit | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of a type; ``bit`` needs its fitted median."""
    if stored == "bit":
        if fitted is None:
            raise ValueError("bits need a fitted median")
        return {"signatures": pack(fitted.bits(phi_ND))}
    if stored == "int8":
        root_ND = np.sign(phi_ND) * np.sqrt(np.abs(phi_ND))
        scale_N = np.abs(root_ND).max(axis=1, initial=0.0) / np.float32(_LEVELS)
        levels_ND = np.rint(root_ND / np.where(scale_N == 0, 1.0, scale_N)[:, None]).astype(np.int8)
        return {"signatures": levels_ND, "scales": scale_N.astype(np.float32)}
    return {"signatures": phi_ND.astype(_FLOATS[stored])}


def decode(arrays: Mapping[str, NDArray[Any]], stored: IndexType, dimension: int) -> Signatures:
    """Signatures (N, D) as float32; those of ``bit`` are calibrated, ±1/√D."""
    kept = arrays["signatures"]
    if stored == "bit":
        return signs(unpack(kept, dimension))
    if stored == "int8":
        root_ND = kept.astype(np.float32) * arrays["scales"][:, None]
        return root_ND * np.abs(root_ND)
    return np.asarray(kept, dtype=np.float32)
