"""Exact and near duplicates: MinHash LSH finds the candidates, the exact Jaccard index decides."""

from __future__ import annotations

import zlib
from typing import Literal

Kind = Literal["exact", "near"]

_PERMUTATIONS = 128
_SHINGLE = 5


class DuplicateIndex:
    """The documents kept so far, asked whether a further one repeats any of them.

    Asked in the order of priority, it keeps the first of every group of duplicates; of pairs exactly as similar as
    ``threshold`` about one in a thousand is missed, of more similar ones fewer.

    Args:
        threshold: Jaccard index of two texts' character 5-grams (case folded) from which they are near duplicates.
        seed: seed of the MinHash permutations.
    """

    def __init__(self, threshold: float, seed: int) -> None:
        from datasketch import MinHash, MinHashLSH

        self._threshold = threshold
        self._blank = MinHash(num_perm=_PERMUTATIONS, seed=seed, scheme="affine32", hashfunc=zlib.crc32)
        # Asked below the threshold and tuned for recall, because the exact index sorts the needless candidates out.
        self._lsh = MinHashLSH(threshold=0.8 * threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
        self._kept: set[str] = set()

    def add(self, text: str) -> Kind | None:
        """Keep ``text`` and return None; or, where it repeats a kept one, say how and leave it out."""
        return self.place(text)[0]

    def place(self, text: str) -> tuple[Kind | None, str]:
        """As :meth:`add`, and the kept text, case folded, that stands for ``text``: itself, or the most alike one."""
        folded = text.casefold()
        if folded in self._kept:
            return "exact", folded
        grams = shingles(folded)
        sketch = self._blank.copy()
        sketch.update_batch([gram.encode() for gram in grams])
        found = max(((jaccard(grams, shingles(other)), other) for other in self._lsh.query(sketch)), default=(0.0, ""))
        if found[0] >= self._threshold:
            return "near", found[1]
        self._lsh.insert(folded, sketch)
        self._kept.add(folded)
        return None, folded


def shingles(text: str) -> set[str]:
    """The character 5-grams of ``text``; a shorter text is its own only one."""
    return {text[start : start + _SHINGLE] for start in range(max(1, len(text) - _SHINGLE + 1))}


def jaccard(left: set[str], right: set[str]) -> float:
    """Jaccard index |A ∩ B| / |A ∪ B| of two sets that are not both empty."""
    common = len(left & right)
    return common / (len(left) + len(right) - common)
