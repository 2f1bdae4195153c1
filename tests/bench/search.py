"""The best 100 of a million signatures of one bit a coordinate, streamed from shards on disk."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tasks.scoring import index, search, store
from tasks.scoring.bits import Agreement, packed_bytes
from tasks.scoring.calibration import MedianBit
from tasks.scoring.config import FitConfig, SketchConfig

DOCUMENTS = 1_000_000
QUERIES = 100
TOP = 100
SKETCH = SketchConfig()


def write_random(out: Path, documents: int, a_shard: int) -> None:
    """An index of random bits."""
    rng = np.random.default_rng(0)
    index.begin(out, {"model": "none", "sketch": SKETCH.plain(), "type": "bit", "calibration": FitConfig().plain()})
    index.write_calibration(out, MedianBit(np.zeros(SKETCH.dimension, dtype=np.float32)))
    shards = range(0, documents, a_shard)
    for number, start in enumerate(shards):
        count = min(a_shard, documents - start)
        encoded = store.Encoder(count, "bit")
        encoded.arrays["signatures"] = rng.integers(0, 256, (count, packed_bytes(SKETCH.dimension)), dtype=np.uint8)
        index.write_shard(out, number, encoded=encoded, n_tokens=[100] * count,
                          doc_ids=[f"{place:032x}" for place in range(start, start + count)])  # fmt: skip
    index.finish(out, 0, len(shards), made_of={"data": "none", "scorer": {"model": "none", "revision": None}})


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Wall and CPU seconds of a call."""
    begun, used = time.perf_counter(), time.process_time()
    call()
    return {"wall": round(time.perf_counter() - begun, 2), "cpu": round(time.process_time() - used, 2)}


def kernels(queries: int = QUERIES) -> dict[str, float]:
    """CPU seconds for a million documents of the distances alone, by numkong and by numpy, from one block."""
    rng = np.random.default_rng(1)
    codes_NB = rng.integers(0, 256, (8192, packed_bytes(SKETCH.dimension)), dtype=np.uint8)
    query_QB = codes_NB[:queries]
    agreement = Agreement(query_QB, SKETCH.dimension)
    words, query_words = codes_NB.view(np.uint64), query_QB.view(np.uint64)

    def by_numpy() -> None:
        for query in query_words[:10]:
            np.bitwise_count(words ^ query).sum(axis=1, dtype=np.uint16)

    scale = DOCUMENTS / len(codes_NB)
    return {"numkong": round(timed(lambda: [agreement(codes_NB) for _ in range(4)])["cpu"] * scale / 4, 2),
            "numpy": round(timed(by_numpy)["cpu"] * scale * queries / 10, 2)}  # fmt: skip


def run(documents: int = DOCUMENTS, a_shard: int = 16_384) -> dict[str, Any]:
    """Figures of both kinds of search, with the shards' checksums verified on the way and without."""
    query_QD = np.random.default_rng(2).normal(size=(QUERIES, SKETCH.dimension)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        write_random(out, documents, a_shard)
        figures: dict[str, Any] = {"documents": documents, "documents a shard": a_shard, "queries": QUERIES, "top": TOP,
                                   "bytes a document": packed_bytes(SKETCH.dimension)}  # fmt: skip
        for label, verify in (("", False), (", checksums verified", True)):
            pool = index.Index(out, verify=verify)
            figures[f"{QUERIES} queries{label}"] = timed(lambda pool=pool: search.per_query(pool, query_QD, TOP))
            pool = index.Index(out, verify=verify)
            figures[f"mean-pooled{label}"] = timed(lambda pool=pool: search.mean_pooled(pool, query_QD, TOP))
        figures["peak MiB of the process"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    figures["distances alone, CPU seconds per million documents"] = kernels()
    return figures


if __name__ == "__main__":
    print(json.dumps(run(*map(int, sys.argv[1:])), indent=2))
