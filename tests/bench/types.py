"""Bytes, auPRC and purity of every signature type and several sizes on the demo pool."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from flows.config import load
from tasks.common.models import load_causal_lm, load_tokenizer, locate, torch_dtype
from tasks.pool.build import build_pool
from tasks.scoring import calibration, store
from tasks.scoring.batching import Tokenized, tokenize
from tasks.scoring.config import IndexType, SketchConfig
from tasks.scoring.engine import forward
from tasks.scoring.readout import Readout
from tasks.scoring.rise import Sketcher
from tasks.selection.metrics import per_query_metrics
from tests.bench.engine import BATCH_TOKENS, SMOLLM2

SIZES = ((64, 12, 64), (128, 24, 128), (256, 96, 256))
"""K_r, K_h, K_g: the paper's two for Pythia-1B, and one sixteen times the first."""
TYPES = (("fp16", "none"), ("fp16", "center"), ("fp16", "power:0.3"), ("int8", "power:0.3"), ("bit", "median-bit"))


def run() -> dict[str, Any]:
    """A row a size, type and calibration."""
    config = load(Path(__file__).parents[2] / "conf" / "closed_loop" / "demo.yaml")
    tokenizer = load_tokenizer(locate(SMOLLM2))
    documents: dict[str, Tokenized] = {}
    with tempfile.TemporaryDirectory() as folder:
        build_pool(config.pool, Path(folder), seed=config.seed)
        labels: dict[str, str] = {}
        for split in ("pool", "queries"):
            table = pq.read_table(Path(folder) / f"{split}.parquet")
            documents[split] = tokenize(tokenizer, table["doc_id"].to_pylist(), table["text"].to_pylist(),
                                        config.scorer.max_length)  # fmt: skip
            labels |= dict(zip(table["doc_id"].to_pylist(), table["label"].to_pylist(), strict=True))
    doc_ids = documents["pool"].doc_ids
    by_id = np.argsort(np.array(doc_ids))  # ties go by id
    positive = np.array([labels[doc_ids[place]] == config.pool.control_label for place in by_id])
    readout = Readout(load_causal_lm(locate(SMOLLM2), dtype=torch_dtype("auto")), "bench")
    rows = {}
    for kr, kh, kg in SIZES:
        sketchers = [Sketcher(readout.head, SketchConfig(kr=kr, kh=kh, kg=kg))]
        phi = {split: forward(readout, tokens, range(len(tokens)), batch_tokens=BATCH_TOKENS,
                              sketchers=sketchers).signatures[0] for split, tokens in documents.items()}  # fmt: skip
        for stored, name in TYPES:
            rows[f"{kr}/{kh}/{kg} {stored} {name}"] = _row(
                cast(Any, phi["pool"])[by_id], cast(Any, phi["queries"]), cast(IndexType, stored), name, positive
            )
    return {"pool": f"{len(positive)} documents, {positive.mean():.0%} control", **rows}


def _row(
    pool_ND: NDArray[np.float32], query_QD: NDArray[np.float32], stored: IndexType, name: str, positive: NDArray[Any]
) -> dict[str, float]:
    fitted = calibration.fit(name, [pool_ND])
    median = fitted if isinstance(fitted, calibration.MedianBit) else None
    kept_ND = store.decode(store.encode(pool_ND, stored, median), stored, pool_ND.shape[1])
    if stored != "bit":
        kept_ND = fitted.apply(kept_ND)
    score_QN = fitted.apply(query_QD) @ kept_ND.T
    mean_N = score_QN.mean(axis=0)
    best = np.argsort(-mean_N, kind="stable")[: positive.sum()]
    return {
        "bytes a document": store.bytes_a_document(stored, pool_ND.shape[1]),
        "auPRC": round(float(average_precision_score(positive, mean_N)), 3),
        "purity": round(float(positive[best].mean()), 2),
        "auPRC a query, top and bottom K": round(per_query_metrics(score_QN, positive).auprc, 3),
    }
