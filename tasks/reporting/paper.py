"""The paper's own figures, to be shown beside ours."""

from __future__ import annotations

SOURCE = "RISE, Table 4: OLMo-3-32B ranks a pool of 50,000; Pythia-1B is trained on the top 5,000"

TABLE_4: dict[str, tuple[str, tuple[float | None, float, float, float, float]]] = {
    "base": ("Base Model", (None, 36.71, 79.97, 2.14, 26.88)),
    "random": ("Random", (10.3, 126.65, 191.29, 1.23, 28.33)),
    "embedding": ("Embed Sim", (54.0, 12.62, 245.15, 1.80, 27.13)),
    "trackstar": ("TrackStar", (65.1, 6.63, 242.58, 2.54, 26.37)),
    "bm25": ("BM25", (63.8, 7.50, 332.01, 2.34, 27.30)),
    "rise": ("RISE", (87.6, 2.33, 389.74, 4.10, 26.62)),
}
"""Arm → the paper's name for it, and its row: purity in per cent, perplexity on control and on junk, RULER-CWE and
ARC-Challenge in per cent."""
