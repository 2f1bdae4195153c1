"""Shards made by Ray's workers, a Prefect task a worker: ``python -m flows.distributed``, a process of its own.

It is started where a scorer has ``ray``, and ends when the process that started it does, and with it a Ray of its own.
Nothing is reported to anybody, there is no dashboard, and a Ray of its own listens on the loopback address alone.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import flow, task
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.common.errors import InputError
from tasks.scoring import share as sharing
from tasks.scoring.config import RayConfig
from tasks.scoring.rivals.child import serve, tell

OBJECTS = 100 << 20
"""Bytes of Ray's object store, through which nothing large travels."""
POLL_SECONDS = 1.0


@task(name="share", task_run_name="{part} {rank}")
def share(work: str, part: sharing.Part, rank: int, world: int) -> None:
    """One worker's share of the shards: it loads the model, and makes one after the other."""
    sharing.make_share(work, part, rank, world)


def _shards(work: str, workers: int, ray: RayConfig) -> None:
    """Make every missing shard of some work, inside a flow.

    Args:
        work: what :mod:`tasks.scoring.share` wrote down.
        workers: how many share it.
        ray: what each of them needs.

    Raises:
        InputError: a worker's own, or no machine of Ray's has what a worker needs.
        RuntimeError: a worker died once too often.
    """
    from prefect_ray.context import remote_options

    needs = _needs(ray)
    left = sharing.left(work)
    for part in sharing.parts(work):
        with remote_options(**needs, max_retries=ray.retries):
            futures = [share.submit(work, part, rank, workers) for rank in range(workers)]
        while futures:
            futures = _pending(futures)
            before, left = left, sharing.left(work)
            if before > left:
                tell(before - left)
        if part == "sample":
            sharing.fit_sample(work)


def _needs(config: RayConfig) -> dict[str, int]:
    """What Ray gives to each worker.

    Raises:
        InputError: no machine has it, and the worker would be waited for without end.
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = config.gpus if config.gpus is not None else int(any(one.get("GPU", 0) >= 1 for one in machines))
    if not any(one.get("CPU", 0) >= config.cpus and one.get("GPU", 0) >= gpus for one in machines):
        most = max(one.get("GPU", 0) for one in machines)
        raise InputError(f"a worker needs {config.cpus} cores and {gpus} GPUs, and no machine of Ray's has both: there "
                         f"are {max(one.get('CPU', 0) for one in machines):g} cores and {most:g} GPUs at most",
                         field="ray.gpus")  # fmt: skip
    return {"num_cpus": config.cpus, "num_gpus": gpus}


def _pending(futures: list[Any]) -> list[Any]:
    """Those that are not over after a second; the first that failed raises what it failed of."""
    import ray

    over, _ = ray.wait([future.wrapped_future for future in futures], num_returns=len(futures), timeout=POLL_SECONDS)
    try:
        for future in futures:
            if future.wrapped_future in over:
                future.result()
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"a worker of Ray was lost for good ({str(error).splitlines()[0]}); the shards that are "
                           "whole are kept, the same command goes on") from None  # fmt: skip
    return [future for future in futures if future.wrapped_future not in over]


@contextmanager
def _prefect() -> Iterator[None]:
    """A Prefect server for this process and all workers: the configured one, else one for as long as it takes."""
    if PREFECT_API_URL.value():
        yield
        return
    from prefect.server.api.server import SubprocessASGIServer

    with SubprocessASGIServer() as server:
        os.environ["PREFECT_API_URL"] = server.api_url  # what Ray starts from here inherits it
        with temporary_settings({PREFECT_API_URL: server.api_url}):
            yield


def work(given: dict[str, Any]) -> None:
    """What :func:`tasks.scoring.build.build_indexes` wants of this process."""
    config, workers = RayConfig.model_validate(given["ray"]), given["workers"]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if config.address is None:
        os.environ |= {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # without, a machine is known by its loopback address
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
    from prefect_ray import RayTaskRunner

    own = {
        "num_cpus": max(1, workers * config.cpus), "include_dashboard": False, "object_store_memory": OBJECTS,
        "_temp_dir": given["temp"],
    }  # fmt: skip
    # Without an address Ray joins a cluster where it finds one, and the runner takes auto for none.
    where = {"address": config.address} if config.address else {"address": "local", **own}
    runner = RayTaskRunner(init_kwargs={"log_to_driver": False, **where})

    # The work is no parameter: a server takes parameters of some hundred kilobytes at most.
    @flow(name="shards", task_runner=runner, log_prints=False)
    def shards(workers: int) -> None:
        _shards(given["work"], workers, config)

    with _prefect():
        shards(workers)


if __name__ == "__main__":
    serve(work)
