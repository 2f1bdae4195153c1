"""Building an index: plan, forward passes shard by shard, manifest. Goes on at the shard where it was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tasks.common.errors import InputError
from tasks.common.files import write_json
from tasks.common.models import Located, load_causal_lm, load_tokenizer, locate, torch_dtype
from tasks.common.progress import Progress, Report
from tasks.scoring import index
from tasks.scoring.batching import Tokenized, shards, tokenize
from tasks.scoring.config import ScorerConfig, SketchConfig

VERSION = 1
"""Version of what the readout computes; part of every key made from it."""


def build_index(
    documents: Path,
    out: Path,
    scorer: ScorerConfig,
    sketch: SketchConfig | None,
    *,
    stored: str = "fp16",
    losses: bool = False,
    label: str = "readout",
    report: Report | None = None,
) -> int:
    """Build the index of a Parquet file of documents, or go on with it.

    Args:
        documents: Parquet with doc_id and text.
        out: the index's directory.
        scorer: the model and how it is run.
        sketch: Algorithm 2's parameters; None makes no signatures (with ``losses``: the perplexity baseline).
        stored: type of the stored signatures.
        losses: also keep each document's mean negative log-likelihood.
        label: shown beside the progress bar.
        report: told the share done.

    Returns:
        The number of documents.

    Raises:
        InputError: the model cannot be used, or ``out`` holds an index made of something else.
    """
    located = locate(scorer.model, revision=scorer.revision)
    table = pq.read_table(documents, columns=["doc_id", "text"])
    doc_ids, texts = table.column("doc_id").to_pylist(), table.column("text").to_pylist()
    tokenized = tokenize(load_tokenizer(located), doc_ids, texts, scorer.max_length)
    plan = shards(tokenized, scorer.shard_tokens)
    index.begin(out, _identity(located, tokenized, scorer, sketch, stored, losses))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    missing = [number for number in range(len(plan)) if not index.shard_done(out, number)]
    if missing and world == 1 and scorer.processes > 1:
        _launch(documents, out, scorer, sketch, stored=stored, losses=losses, label=label)
    elif missing[rank::world]:
        _build_shards(located, tokenized, plan, missing[rank::world], out, scorer, sketch, stored, losses, label,
                      report)  # fmt: skip
    if world == 1:
        index.finish(out, len(plan))
    return len(tokenized)


def _identity(
    located: Located, tokenized: Tokenized, scorer: ScorerConfig, sketch: SketchConfig | None, stored: str, losses: bool
) -> dict[str, Any]:
    """All that decides the index's bytes."""
    return {
        "model": located.digest,
        "precision": str(torch_dtype(scorer.precision)).removeprefix("torch."),
        "max_length": scorer.max_length,
        "batch_tokens": scorer.batch_tokens,
        "shard_tokens": scorer.shard_tokens,
        "sketch": sketch.plain() if sketch else None,
        "type": stored,
        "losses": losses,
        "documents": tokenized.digest(),
    }


def _build_shards(
    located: Located,
    tokenized: Tokenized,
    plan: list[range],
    numbers: list[int],
    out: Path,
    scorer: ScorerConfig,
    sketch: SketchConfig | None,
    stored: str,
    losses: bool,
    label: str,
    report: Report | None,
) -> None:
    import torch

    from tasks.scoring.engine import forward
    from tasks.scoring.readout import Readout
    from tasks.scoring.rise import Sketcher

    if scorer.threads is not None:
        torch.set_num_threads(scorer.threads)
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model = load_causal_lm(located, dtype=torch_dtype(scorer.precision), device_map=scorer.device_map)
    readout = Readout(model, located.spec)
    longest = tokenized.length(len(tokenized) - 1)
    if readout.positions is not None and longest > readout.positions:
        raise InputError(f"the scorer has {readout.positions} positions, a document {longest} tokens; cut documents at "
                         f"{readout.positions}", file=located.spec, field="max_length")  # fmt: skip
    sketcher = Sketcher(readout.head, sketch) if sketch else None
    sizes = [sum(tokenized.lengths(shard)) for shard in plan]
    done = sum(sizes) - sum(sizes[number] for number in numbers)
    with Progress(label, sum(sizes), "tokens", done=done, report=report) as progress:
        for number in numbers:
            made = forward(readout, tokenized, plan[number], batch_tokens=scorer.batch_tokens, sketcher=sketcher,
                           losses=losses, count=progress.add)  # fmt: skip
            places = plan[number]
            signatures = made.signatures
            if signatures is None:
                import numpy as np

                signatures = np.zeros((len(places), 0), dtype=np.float32)
            index.write_shard(
                out, number, signatures=signatures, doc_ids=[tokenized.doc_ids[place] for place in places],
                n_tokens=tokenized.lengths(places), losses=made.losses, stored=stored,
            )  # fmt: skip


def _launch(
    documents: Path, out: Path, scorer: ScorerConfig, sketch: SketchConfig | None, *, stored: str, losses: bool,
    label: str,
) -> None:  # fmt: skip
    """Share the missing shards among processes; each writes its own."""
    spec = out / "workers.json"
    write_json(spec, {"documents": str(documents), "out": str(out), "scorer": scorer.plain(),
                      "sketch": sketch.plain() if sketch else None, "stored": stored, "losses": losses,
                      "label": label})  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               str(scorer.processes), "-m", "tasks.scoring.worker", str(spec)]  # fmt: skip
    done = subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": str(scorer.threads or 1)})
    spec.unlink()
    if done.returncode != 0:
        raise RuntimeError(f"a scoring worker failed (exit {done.returncode}); the shards that are whole are kept")
