"""Stage 1 as a Prefect task."""

from pathlib import Path
from typing import Any

from prefect import task

from tasks.common.stage import run_stage
from tasks.face import reporter, settle, worth_retrying
from tasks.pool.build import VERSION, build_pool, pool_inputs
from tasks.pool.config import PoolConfig
from tasks.pool.facts import VERSION as FACTS_VERSION
from tasks.pool.facts import FactsConfig, build_facts, facts_inputs


@task(name="pool", retries=2, retry_delay_seconds=5, retry_condition_fn=worth_retrying)
def pool(config: PoolConfig, directory: str, *, seed: int, refresh: bool = False) -> Any:
    """Candidate pool, query set and held-out sets."""
    return settle(run_stage(
        Path(directory), stage="pool", version=VERSION, config={**config.plain(), "seed": seed},
        inputs=pool_inputs(config), refresh=refresh,
        work=lambda out: build_pool(config, out, seed=seed, progress=reporter("near duplicates")),
    ))  # fmt: skip


@task(name="facts", task_run_name="facts {size}", retries=2, retry_delay_seconds=5,
      retry_condition_fn=worth_retrying)  # fmt: skip
def facts(config: FactsConfig, directory: str, *, size: int, seed: int, refresh: bool = False) -> Any:
    """Facts as queries, and one of the candidate pools that they are traced in."""
    return settle(run_stage(
        Path(directory), stage="pool", version=FACTS_VERSION, refresh=refresh, inputs=facts_inputs(config),
        config={**config.model_dump(mode="json", exclude={"sizes"}), "size": size, "seed": seed},
        work=lambda out: build_facts(config, out, size=size, seed=seed, progress=reporter("drawing passages")),
    ))  # fmt: skip
