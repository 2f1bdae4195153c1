"""The closed loop: pool → score → select → pretrain → evaluate → report, one arm a method."""

from pathlib import Path
from typing import Any

from prefect import flow

from flows.config import BASE, ORACLE, ClosedLoopConfig
from flows.rundir import claimed, write_manifest
from tasks.common.models import locate
from tasks.common.stage import Ref
from tasks.evaluation.task import evaluate, prepare
from tasks.pool.task import pool
from tasks.pretraining.task import pretrain
from tasks.reporting.task import publish, report
from tasks.scoring.config import PerplexityConfig, RiseConfig
from tasks.scoring.methods import shared_type, sketch_name
from tasks.scoring.task import needs_readout, readout, score, tokens
from tasks.selection.ledger import ArmFiles, ledger_digest
from tasks.selection.task import ledger, oracle, select


@flow(name="closed-loop", flow_run_name="{config.name}", log_prints=False)
def closed_loop(config: ClosedLoopConfig, out: str, refresh: tuple[str, ...] = ()) -> str:
    """Run the closed loop of a configuration in the directory ``out``, or go on with it.

    Args:
        config: everything the run is made of.
        out: the run's directory; what is whole in it is not made again.
        refresh: stages to make again although they are whole.

    Returns:
        The digest of the run: equal for equal runs, interrupted or not.
    """
    directory = Path(out)
    with claimed(directory, config):
        return _run(config, directory, frozenset(refresh))


def _run(config: ClosedLoopConfig, out: Path, refresh: frozenset[str]) -> str:
    stages: list[Ref] = []

    def made(task: Any, *inputs: Any, stage: str, directory: str, **options: Any) -> Ref:
        again = stage in refresh
        state = task(*inputs, str(out / stage / directory), refresh=again, return_state=True, **options)
        ref: Ref = state.result()
        stages.append(ref)
        return ref

    trainee = config.pretraining.model, config.pretraining.revision
    documents = made(pool, config.pool, stage="pool", directory=".", seed=config.seed)
    counted = made(tokens, config.scorer, documents, stage="scoring", directory="tokens")

    read = None
    if any(needs_readout(method) for method in config.arms.values()):
        # One forward pass serves perplexity and every RISE arm; an arm makes its own type of index from its floats.
        rises = [method for method in config.arms.values() if isinstance(method, RiseConfig)]
        read = made(
            readout, config.scorer, {sketch_name(rise.sketch): rise.sketch for rise in rises}, documents,
            stage="scoring", directory="readout", name="readout", stored=shared_type(rises),
            losses=any(isinstance(method, PerplexityConfig) for method in config.arms.values()),
        )  # fmt: skip
    selected: dict[str, Ref] = {}
    scored: dict[str, Ref] = {}
    for arm, method in config.arms.items():
        of_arm = read if needs_readout(method) else None
        scored[arm] = made(score, method, config.scorer, documents, of_arm, stage="scoring", directory=arm, arm=arm)
        selected[arm] = made(select, config.selection, documents, scored[arm], stage="selection", directory=arm,
                             arm=arm)  # fmt: skip
    if config.oracle:
        selected[ORACLE] = made(oracle, config.selection, documents, stage="selection", directory=ORACLE)

    prompts = made(prepare, config.evaluation, *trainee, stage="evaluation", directory="prompts")
    models: dict[str, tuple[str, str]] = {}
    evaluated: dict[str, Ref] = {}
    trained: dict[str, Ref] = {}
    if config.base:
        located = locate(trainee[0], revision=trainee[1])
        models[BASE] = str(located.path), located.digest
    for arm, chosen in selected.items():
        trained[arm] = made(pretrain, config.pretraining, chosen, stage="pretraining", directory=arm, arm=arm)
        models[arm] = str(trained[arm].dir / "model"), trained[arm].digest
    for arm, (path, digest) in models.items():
        evaluated[arm] = made(evaluate, config.evaluation, path, digest, prompts, documents, stage="evaluation",
                              directory=arm, arm=arm)  # fmt: skip

    book = out / "study.duckdb"
    arms = {arm: ArmFiles(
        scores=scored[arm].dir / "scores.parquet" if arm in scored else None,
        selected=selected[arm].dir / "selected.parquet" if arm in selected else None,
        history=trained[arm].dir / "history.parquet" if arm in trained else None,
        metrics=evaluated[arm].dir / "metrics.parquet",
    ) for arm in models}  # fmt: skip
    splits = {split: documents.dir / f"{split}.parquet" for split in ("pool", "queries", "heldout")}
    ledger(config.selection, str(book), documents=splits, tokens=counted.dir / "tokens.parquet", arms=arms,
           stages=stages)  # fmt: skip
    digest = write_manifest(out, config, stages, {"ledger": ledger_digest(book)})
    report(out)
    publish(out)
    return digest
