"""BM25 (Okapi) through bm25s."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def bm25_scores(documents: Sequence[str], queries: Sequence[str], *, k1: float, b: float) -> NDArray[np.float32]:
    """BM25 of every document for every query, (Q, N). Words are folded to lower case; English stop words are out."""
    import bm25s

    retriever = bm25s.BM25(k1=k1, b=b, backend="numpy")
    tokens = bm25s.tokenize(list(documents), stopwords="en", show_progress=False)
    if not tokens.vocab:  # numbers of one digit, stop words: no document has a word
        return np.zeros((len(queries), len(documents)), dtype=np.float32)
    retriever.index(tokens, show_progress=False)
    words = bm25s.tokenize(list(queries), stopwords="en", return_ids=False, show_progress=False)
    known = retriever.vocab_dict
    rows = []
    for query in words:
        ids = [word for word in query if word in known]
        rows.append(retriever.get_scores(ids) if ids else np.zeros(len(documents), dtype=np.float32))
    return np.stack(rows).astype(np.float32)
