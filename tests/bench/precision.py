"""Whether a forward pass in int8 keeps the ranking, and whether it is faster."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from tasks.common.errors import InputError
from tasks.common.models import load_causal_lm, locate
from tasks.scoring.batching import Tokenized
from tasks.scoring.config import SketchConfig
from tasks.scoring.engine import forward
from tasks.scoring.readout import Readout
from tasks.scoring.rise import Sketcher
from tests.bench.engine import BATCH_TOKENS, SMOLLM2, demo_pool, demo_texts


class _Unchecked(Readout):
    """Without the check for causality, which dynamic int8 fails: one scale for all activations of a batch lets every
    position see the others."""

    def _check(self) -> None:
        return


def _scores(model: Any, documents: Tokenized) -> tuple[np.ndarray, float]:
    readout = _Unchecked(model, "bench")
    begun = time.process_time()
    made = forward(readout, documents, range(len(documents)), batch_tokens=BATCH_TOKENS,
                   sketchers=[Sketcher(readout.head, SketchConfig())])  # fmt: skip
    seconds = time.process_time() - begun
    phi_ND = made.signatures[0]
    centred = phi_ND - phi_ND.mean(axis=0)
    # Every fifth document serves as a query: the ranking is of the others.
    return centred @ centred[::5].mean(axis=0), seconds


def run() -> dict[str, Any]:
    """float32 against dynamic int8 of all linear layers but the head (torch.ao)."""
    with tempfile.TemporaryDirectory() as folder:
        documents = demo_pool(demo_texts(Path(folder)))
    plain = load_causal_lm(locate(SMOLLM2), dtype=torch.float32)
    expected, floor = _scores(plain, documents)
    layers = {name for name, module in plain.named_modules()
              if isinstance(module, torch.nn.Linear) and module is not plain.get_output_embeddings()}  # fmt: skip
    quantized = torch.ao.quantization.quantize_dynamic(plain, layers, dtype=torch.qint8)
    made, seconds = _scores(quantized, documents)
    try:
        Readout(quantized, "int8")
        refused = ""
    except InputError as error:
        refused = str(error)
    return {"refused by the engine": refused,
            "Spearman with float32": round(float(spearmanr(expected, made).statistic), 4),
            "CPU seconds over float32": round(seconds / floor, 3)}  # fmt: skip
