"""Stage 3 as Prefect tasks: the top K of a ranking, and the ledger over everything a run made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import task

from tasks.common.stage import Ref, run_stage
from tasks.face import settle
from tasks.selection.config import SelectionConfig
from tasks.selection.ledger import ArmFiles, write_ledger
from tasks.selection.retrieval import VERSION as RETRIEVAL_VERSION
from tasks.selection.retrieval import RetrievalConfig
from tasks.selection.retrieval import retrieve as retrieve_metrics
from tasks.selection.select import VERSION
from tasks.selection.select import oracle as select_oracle
from tasks.selection.select import select as select_top
from tasks.selection.tracing import VERSION as TRACING_VERSION
from tasks.selection.tracing import TracingConfig
from tasks.selection.tracing import trace as trace_evidence


@task(name="select", task_run_name="select {arm}")
def select(
    config: SelectionConfig, pool: Ref, scores: Ref, directory: str, *, arm: str, refresh: bool = False
) -> Any:
    """The K best documents of one ranking."""
    return settle(run_stage(
        Path(directory), stage="selection", method=arm, version=VERSION, config=config.plain(), refresh=refresh,
        inputs={"pool": pool.digest, "scores": scores.digest},
        work=lambda out: select_top(config, scores.dir / "scores.parquet", pool.dir / "pool.parquet", out),
    ))  # fmt: skip


@task(name="oracle")
def oracle(config: SelectionConfig, pool: Ref, directory: str, *, refresh: bool = False) -> Any:
    """K documents of the wanted label: the upper bound of any selection."""
    return settle(run_stage(
        Path(directory), stage="selection", method="oracle", version=VERSION, config=config.plain(), refresh=refresh,
        inputs={"pool": pool.digest}, work=lambda out: select_oracle(config, pool.dir / "pool.parquet", out),
    ))  # fmt: skip


@task(name="retrieve", task_run_name="retrieve {arm}")
def retrieve(
    config: RetrievalConfig, pool: Ref, scores: Ref, directory: str, *, arm: str, refresh: bool = False
) -> Any:
    """The paper's retrieval metrics of one scored pool."""
    return settle(run_stage(
        Path(directory), stage="selection", method=arm, version=RETRIEVAL_VERSION, config=config.plain(),
        inputs={"pool": pool.digest, "scores": scores.digest}, refresh=refresh,
        work=lambda out: retrieve_metrics(config, pool.dir, scores.dir, out),
    ))  # fmt: skip


@task(name="trace", task_run_name="trace {arm}")
def trace(config: TracingConfig, pool: Ref, scores: Ref, directory: str, *, arm: str, refresh: bool = False) -> Any:
    """How early the evidence of every fact stands."""
    return settle(run_stage(
        Path(directory), stage="selection", method=arm, version=TRACING_VERSION, config=config.plain(),
        inputs={"pool": pool.digest, "scores": scores.digest}, refresh=refresh,
        work=lambda out: trace_evidence(config, pool.dir, scores.dir, out),
    ))  # fmt: skip


@task(name="ledger")
def ledger(
    config: SelectionConfig, path: str, *, documents: Mapping[str, Path], tokens: Path, arms: Mapping[str, ArmFiles],
    stages: Sequence[Ref],
) -> str:  # fmt: skip
    """study.duckdb, made anew from the stages' files; seconds."""
    write_ledger(Path(path), config=config, documents=documents, tokens=tokens, arms=arms, stages=stages)
    return path
