"""Memory and time of ``rise index build`` at 20,000 documents over 2,000, and of the whole process over its floor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.common.models import load_tokenizer, locate
from tests.bench.engine import SMOLLM2

SIZES = (2_000, 20_000)


def small_model(folder: Path) -> Path:
    """A random model in Pythia-14M's shape with SmolLM2's tokenizer: in a small model the rest counts."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=49152, hidden_size=128, intermediate_size=512, num_hidden_layers=6,
                           num_attention_heads=4, max_position_embeddings=2048)  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    load_tokenizer(locate(SMOLLM2)).save_pretrained(folder)
    return folder


def write_pool(path: Path, count: int) -> Path:
    """Tweets of health news desks, cut and joined by nothing: about 30 tokens each."""
    from tasks.pool.cleaning import clean
    from tasks.pool.sources import READERS

    seen: set[str] = set()
    with path.open("w", encoding="utf-8") as file:
        for raw in READERS["health_tweets"].read():
            text = clean(raw)
            if text and text not in seen:
                seen.add(text)
                file.write(json.dumps({"text": text}) + "\n")
                if len(seen) == count:
                    return path
    raise RuntimeError(f"only {len(seen)} different tweets")


def measured(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds and peak resident memory (MiB) of a command."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    return {"wall": round(time.perf_counter() - begun, 1), "cpu": round(usage.ru_utime + usage.ru_stime, 1),
            "peak MiB": round(usage.ru_maxrss / 1024)}  # fmt: skip


def run() -> dict[str, Any]:
    """Figures of both sizes and their ratios."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_model(folder / "model")
        for size in SIZES:
            pool = write_pool(folder / f"{size}.jsonl", size)
            figures[f"{size} documents"] = measured(
                [sys.executable, "-m", "flows.cli", "index", "build", "--model", str(model), "--data", str(pool),
                 "--out", str(folder / f"index{size}"), "--dtype", "bit"]
            )  # fmt: skip
    small, large = (figures[f"{size} documents"] for size in SIZES)
    figures["peak memory, ratio"] = round(large["peak MiB"] / small["peak MiB"], 3)
    figures["CPU seconds, ratio"] = round(large["cpu"] / small["cpu"], 2)
    figures["wall seconds, ratio"] = round(large["wall"] / small["wall"], 2)
    return figures
