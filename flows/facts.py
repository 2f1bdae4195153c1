"""Fact tracing: facts and pools that grow → score → trace → table, every method on every pool (Table 17)."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.attribution import Scoring
from flows.facts_config import FactTracingConfig
from flows.rundir import claimed, write_manifest
from tasks.common.files import sha256_json
from tasks.pool.task import facts as facts_and_pool
from tasks.reporting.facts import Traced, facts_table, write_results
from tasks.scoring.config import LmHeadConfig, RiseConfig
from tasks.selection.task import trace
from tasks.selection.tracing import TracingConfig

BY_POSITION = RiseConfig | LmHeadConfig
"""Methods that a query's prompt can be left out of; the others always compare prompt and completion."""


@flow(name="facts", flow_run_name="{config.name}", log_prints=False)
def facts(config: FactTracingConfig, out: str, refresh: tuple[str, ...] = ()) -> str:
    """Trace facts in the directory ``out``, or go on with it.

    Args:
        config: everything it is made of.
        out: the run's directory; what is whole in it is not made again.
        refresh: stages to make again although they are whole.

    Returns:
        The digest of the run: equal for equal runs, interrupted or not.
    """
    directory = Path(out)
    with claimed(directory, config):
        run, traced = Scoring(config.methods, config.seeds, directory, frozenset(refresh)), list[Traced]()
        judging = TracingConfig(ks=config.ks, resamples=config.resamples, confidence=config.confidence,
                                seed=config.seed)  # fmt: skip
        for size in config.facts.sizes:
            documents = run.made(facts_and_pool, config.facts, stage="pool", directory=f"{size}", size=size,
                                 seed=config.seed)  # fmt: skip
            for one in run.scored(f"{size}", config.scorer, documents):
                scored = None if isinstance(one.scores, str) else one.scores
                found = scored and run.made(trace, judging, documents, scored, stage="selection",
                                            directory=one.directory, arm=one.directory)  # fmt: skip
                traced.append(Traced(size, one.arm, one.seed, isinstance(config.methods[one.arm], BY_POSITION),
                                     found.dir if found else None, scored.dir if scored else None,
                                     one.read.dir if one.read else None,
                                     one.scores if isinstance(one.scores, str) else None))  # fmt: skip
        figures = write_results(directory, traced)
        digest = write_manifest(directory, config, run.stages, {"traces": sha256_json(figures)})
        create_markdown_artifact(f"```\n{facts_table(directory)}\n```", key=f"{config.name.replace('_', '-')}-traces",
                                 description="Table 17 of this run")  # fmt: skip
        return digest
