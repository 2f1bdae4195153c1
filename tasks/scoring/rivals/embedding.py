"""Cosine similarity of sentence embeddings through sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.common.models import locate
from tasks.common.progress import Progress, Report

if TYPE_CHECKING:
    from tasks.scoring.config import EmbeddingConfig


def embedding_scores(
    documents: Sequence[str], queries: Sequence[str], config: EmbeddingConfig, *, report: Report | None = None
) -> NDArray[np.float32]:
    """Cosine of every document for every query, (Q, N)."""
    from sentence_transformers import SentenceTransformer

    located = locate(config.model, revision=config.revision)
    encoder = SentenceTransformer(str(located.path), trust_remote_code=False)
    texts = [config.query_prefix + text for text in queries] + [config.document_prefix + text for text in documents]
    # Longest first, as the encoder itself would sort them: a batch holds texts of about one length.
    order = sorted(range(len(texts)), key=lambda place: (-len(texts[place]), place))
    encoded = np.zeros((len(texts), encoder.get_embedding_dimension()), dtype=np.float32)
    with Progress("embedding", len(texts), "documents", report=report) as progress:
        for start in range(0, len(order), config.batch_size):
            places = order[start : start + config.batch_size]
            encoded[places] = encoder.encode(
                [texts[place] for place in places], batch_size=config.batch_size, normalize_embeddings=True,
                show_progress_bar=False, convert_to_numpy=True,
            )  # fmt: skip
            progress.add(len(places))
    return encoded[: len(queries)] @ encoded[len(queries) :].T
