"""Cosine similarity of sentence embeddings through sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.files import sha256_json
from tasks.common.models import locate
from tasks.common.progress import Report
from tasks.common.usage import searching
from tasks.scoring.rivals.similarity import cosine_scores, kept

if TYPE_CHECKING:
    from tasks.scoring.config import EmbeddingConfig

_BATCHES = 64
"""Batches whose embeddings are written together: what a killed run loses at most."""


def embedding_scores(
    documents: Sequence[str], queries: Sequence[str], config: EmbeddingConfig, work: Path, *,
    report: Report | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """Cosine of every document for every query, (Q, N); the embeddings, float32, are kept in ``work``.

    Raises:
        InputError: the model cannot be used.
    """
    located = locate(config.model, revision=config.revision)

    @cache
    def encoder() -> Any:
        from sentence_transformers import SentenceTransformer

        try:
            return SentenceTransformer(str(located.path), trust_remote_code=False,
                                       model_kwargs={"use_safetensors": True})  # fmt: skip
        except Exception as error:  # its modules are classes that the model names; each raises its own
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InputError(f"is no sentence-transformers model that loads ({first})", file=located.spec) from None

    def embed(texts: list[str], side: str) -> tuple[list[int], list[NDArray[Any]]]:
        # Longest first, as the encoder itself would sort them: a batch holds texts of about one length.
        order = sorted(range(len(texts)), key=lambda place: (-len(texts[place]), place))

        def make(places: range, count: Callable[[int], None]) -> NDArray[np.float32]:
            made: list[NDArray[np.float32]] = []
            for start in range(places.start, places.stop, config.batch_size):
                some = [texts[place] for place in order[start : min(start + config.batch_size, places.stop)]]
                made.append(encoder().encode(some, batch_size=config.batch_size, normalize_embeddings=True,
                                             show_progress_bar=False, convert_to_numpy=True))  # fmt: skip
                count(len(some))
            return np.concatenate(made).astype(np.float32, copy=False)

        step = _BATCHES * config.batch_size
        places = [range(start, min(start + step, len(texts))) for start in range(0, len(texts), step)]
        identity = {"encoder": located.digest, "batch_size": config.batch_size, "texts": sha256_json(texts)}
        parts = kept(work / side, identity, [(some, len(some)) for some in places], make,
                     label=f"embedding, {side}", unit="documents", report=report)  # fmt: skip
        return order, parts

    query_order, query_parts = embed([config.query_prefix + text for text in queries], "queries")
    order, parts = embed([config.document_prefix + text for text in documents], "pool")
    scores = np.empty((len(queries), len(documents)), dtype=np.float32)
    with searching():
        scores[np.ix_(query_order, order)] = cosine_scores(parts, np.concatenate(query_parts), config.calibration)
    return scores
