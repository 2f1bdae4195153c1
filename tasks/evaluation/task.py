"""Stage 4b as Prefect tasks: what all arms are asked, once, then each arm's answers."""

from pathlib import Path
from typing import Any

from prefect import task

from tasks.common.models import locate, torch_dtype
from tasks.common.stage import Ref, run_stage
from tasks.evaluation import evaluate as evaluation
from tasks.evaluation import prepare as preparation
from tasks.evaluation.config import EvaluationConfig
from tasks.face import reporter, settle


@task(name="prepare evaluation")
def prepare(config: EvaluationConfig, trainee: str, revision: str | None, directory: str, *,
            refresh: bool = False) -> Any:  # fmt: skip
    """ARC-Challenge questions and RULER-CWE prompts, the same for every arm."""
    located = locate(trainee, revision=revision)
    if config.ruler_cwe is not None and config.ruler_cwe.tokenizer is not None:
        located = locate(config.ruler_cwe.tokenizer)
    return settle(run_stage(
        Path(directory), stage="evaluation", method="prompts", version=preparation.VERSION, refresh=refresh,
        config=config.model_dump(mode="json", include={"arc", "ruler_cwe", "seed"}),
        inputs={"tokenizer": located.digest},
        work=lambda out: preparation.prepare(config, located, out),
    ))  # fmt: skip


@task(name="evaluate", task_run_name="evaluate {arm}")
def evaluate(
    config: EvaluationConfig, model_dir: str, model_digest: str, prompts: Ref, pool: Ref, directory: str, *, arm: str,
    refresh: bool = False,
) -> Any:  # fmt: skip
    """Perplexity on held-out documents, ARC-Challenge and RULER-CWE of one model."""
    return settle(run_stage(
        Path(directory), stage="evaluation", method=arm, version=evaluation.VERSION, refresh=refresh,
        config=config.plain(),
        inputs={"model": model_digest, "prompts": prompts.digest, "pool": pool.digest,
                "precision": str(torch_dtype(config.precision))},
        work=lambda out: evaluation.evaluate(config, Path(model_dir), prompts.dir, pool.dir / "heldout.parquet", out,
                                             report=reporter(f"evaluate {arm}")),
    ))  # fmt: skip
