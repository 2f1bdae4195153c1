"""Stage 2 as Prefect tasks: the scorer's one forward pass, then a ranking a method."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from prefect import task

from tasks.common.files import sha256_json, whole_file
from tasks.common.models import locate, torch_dtype
from tasks.common.stage import Ref, run_stage
from tasks.common.usage import kept_bytes, measured
from tasks.face import reporter, settle
from tasks.pool.facts import EVIDENCE
from tasks.scoring import build, methods, store
from tasks.scoring.config import (
    SPREAD,
    EmbeddingConfig,
    IndexType,
    LmHeadConfig,
    MethodConfig,
    PerplexityConfig,
    RapidInConfig,
    RiseConfig,
    ScorerConfig,
    SketchConfig,
)
from tasks.scoring.methods import Request, read_out, score_pool, sketch_name, token_counts, write_scores
from tasks.scoring.ranks import RANKS, write_ranks

EXECUTION = {"processes", "ray", "threads", "device_map", "model", "revision"}
"""Fields of the scorer that stay out of a key: they do not change a score, or the model's digest says it better."""


def _scorer_inputs(scorer: ScorerConfig) -> dict[str, str]:
    located = locate(scorer.model, revision=scorer.revision)
    return {"scorer": located.digest, "precision": str(torch_dtype(scorer.precision))}


def _request(pool: Ref, scorer: ScorerConfig, work: Path, what: str) -> Request:
    return Request(pool.dir / "pool.parquet", pool.dir / "queries.parquet", scorer, work, report=reporter(what))


@task(name="readout", task_run_name="readout {name}")
def readout(
    scorer: ScorerConfig, sketches: Mapping[str, SketchConfig], pool: Ref, directory: str, *, name: str,
    stored: IndexType, losses: bool, refresh: bool = False,
) -> Any:  # fmt: skip
    """One forward pass over pool and queries for all sketches of a run, each under its :func:`sketch_name`."""

    def work(out: Path) -> int:
        with measured() as usage:
            rows = read_out(_request(pool, scorer, out, "forward pass"), out, sketches=sketches, stored=stored,
                            losses=losses)  # fmt: skip
        usage.write(out)
        return rows

    return settle(run_stage(
        Path(directory), stage="scoring", method=name, version=build.VERSION, refresh=refresh,
        config={"scorer": scorer.model_dump(mode="json", exclude=EXECUTION), "stored": stored, "losses": losses,
                "sketches": {key: sketch.plain() for key, sketch in sketches.items()}},
        inputs={"pool": pool.digest, **_scorer_inputs(scorer)}, work=work,
    ))  # fmt: skip


@task(name="tokens")
def tokens(scorer: ScorerConfig, pool: Ref, directory: str, *, refresh: bool = False) -> Any:
    """Length of every document in the scorer's tokens."""

    def work(out: Path) -> int:
        counted = token_counts(scorer, pool.dir / "pool.parquet")
        with whole_file(out / "tokens.parquet") as part:
            pq.write_table(counted, part)
        return len(counted)

    return settle(run_stage(
        Path(directory), stage="scoring", method="tokens", version=methods.VERSION, refresh=refresh,
        config={"max_length": scorer.max_length}, work=work,
        inputs={"pool": pool.digest, "scorer": locate(scorer.model, revision=scorer.revision).digest},
    ))  # fmt: skip


@task(name="score", task_run_name="score {arm}")
def score(
    method: MethodConfig, scorer: ScorerConfig, pool: Ref, read: Ref | None, directory: str, *, arm: str,
    refresh: bool = False,
) -> Any:  # fmt: skip
    """A ranking of the pool by one method."""
    inputs = {"pool": pool.digest}
    if read is not None:
        inputs["readout"] = read.digest
    if method.reads_scorer:
        how = scorer.model_dump(mode="json", exclude=EXECUTION)
        inputs |= {**_scorer_inputs(scorer), "reading": sha256_json(how)}
    if isinstance(method, RapidInConfig):
        inputs |= {f"checkpoint {number}": locate(spec).digest for number, spec in enumerate(method.checkpoints)}
    if isinstance(method, EmbeddingConfig):
        inputs["encoder"] = locate(method.model, revision=method.revision).digest

    def work(out: Path) -> int:
        request = replace(_request(pool, scorer, out, arm), readout=_indexes(read, method) if read else None)
        with measured() as usage:
            scores = score_pool(method, request)
        usage.queries = len(scores.query_ids) or None
        usage.bytes_a_document = _bytes_a_document(method, out, len(scores.doc_ids))
        usage.write(out)
        evidence = pool.dir / EVIDENCE
        # A pool that says what its queries are to find asks for no more than that: all pairs may be billions.
        whole = scores.per_query is not None and not evidence.is_file()
        write_scores(scores, out / "scores.parquet", per_query=out / "per_query.parquet" if whole else None)
        if evidence.is_file():
            write_ranks(scores, evidence, out / RANKS)
        return len(scores.doc_ids)

    return settle(run_stage(
        Path(directory), stage="scoring", method=arm, version=methods.VERSION, config=method.plain(), inputs=inputs,
        work=work, refresh=refresh,
    ))  # fmt: skip


def _indexes(read: Ref, method: MethodConfig) -> Path:
    """Where a readout keeps what a method scores from: the indexes of its sketch, or any for the losses."""
    if isinstance(method, RiseConfig):
        return read.dir / sketch_name(method.sketch)
    return min(read.dir.glob("*/pool")).parent


def _bytes_a_document(method: MethodConfig, out: Path, documents: int) -> float | None:
    """Bytes on disk that a method searches, a document; None where it keeps nothing but scores."""
    if isinstance(method, RiseConfig):
        spread = 4 if method.calibration.endswith(SPREAD) else 0
        return spread + store.bytes_a_document(method.index_type, method.sketch.dimension)
    if isinstance(method, LmHeadConfig) and method.variant in ("exact", "sparse"):
        return None
    return kept_bytes(out) / documents or None


def needs_readout(method: MethodConfig) -> bool:
    """Whether a method scores from the scorer's forward pass."""
    return isinstance(method, RiseConfig | PerplexityConfig)
