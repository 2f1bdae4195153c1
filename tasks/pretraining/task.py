"""Stage 4a as a Prefect task."""

from pathlib import Path
from typing import Any

from prefect import task

from tasks.common.models import locate, torch_dtype
from tasks.common.stage import Ref, run_stage
from tasks.face import reporter, settle
from tasks.pretraining.config import PretrainingConfig
from tasks.pretraining.train import VERSION, train


@task(name="pretrain", task_run_name="pretrain {arm}")
def pretrain(
    config: PretrainingConfig, selected: Ref, directory: str, *, arm: str, refresh: bool = False
) -> Any:
    """Continued pretraining of the trainee on what one arm selected."""
    trainee = locate(config.model, revision=config.revision)
    return settle(run_stage(
        Path(directory), stage="pretraining", method=arm, version=VERSION, refresh=refresh,
        config=config.model_dump(mode="json", exclude={"model", "revision", "checkpoint_every"}),
        inputs={"selected": selected.digest, "trainee": trainee.digest,
                "precision": str(torch_dtype(config.precision))},
        work=lambda out: train(config, selected.dir / "selected.parquet", out, report=reporter(f"pretrain {arm}")),
    ))  # fmt: skip
