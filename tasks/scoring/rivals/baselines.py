"""Baselines that look at no query: chance, and the shortcuts a pool may hide."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def random_scores(doc_ids: Sequence[str], seed: int) -> NDArray[np.float64]:
    """Uniform in [0, 1), drawn from each document's id, so it depends on nothing else in the pool."""
    digests = (hashlib.sha256(f"random/{seed}/{doc_id}".encode()).digest() for doc_id in doc_ids)
    return np.array([int.from_bytes(digest[:7], "big") / 2.0**56 for digest in digests])
