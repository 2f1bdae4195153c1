"""Stage 1 as a Prefect task."""

from pathlib import Path
from typing import Any

from prefect import task

from tasks.common.stage import run_stage
from tasks.face import reporter, settle, worth_retrying
from tasks.pool.build import VERSION, build_pool, pool_inputs
from tasks.pool.config import PoolConfig


@task(name="pool", retries=2, retry_delay_seconds=5, retry_condition_fn=worth_retrying)
def pool(config: PoolConfig, directory: str, *, seed: int, refresh: bool = False) -> Any:
    """Candidate pool, query set and held-out sets."""
    return settle(run_stage(
        Path(directory), stage="pool", version=VERSION, config={**config.plain(), "seed": seed},
        inputs=pool_inputs(config), refresh=refresh,
        work=lambda out: build_pool(config, out, seed=seed, progress=reporter("near duplicates")),
    ))  # fmt: skip
