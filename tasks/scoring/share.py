"""Sharing the missing shards of indexes: among processes of this machine, or Ray's workers on any.

The process that shares writes down what the work is; each worker reads the model and the documents itself, refuses any
that are not the same, and writes its own shards.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter

from tasks.common.errors import InputError
from tasks.common.models import Located, locate
from tasks.common.progress import Report
from tasks.scoring import index
from tasks.scoring.config import ScorerConfig
from tasks.scoring.plan import Batch, read_batch
from tasks.scoring.rivals.child import run_child
from tasks.scoring.shards import Job, Missing, build_shards, fit_median, load, missing_of, precision_of

if TYPE_CHECKING:
    from tasks.scoring.readout import Readout

LONGEST_TEMP = 30
"""Characters of the place where Ray keeps its sockets: a socket's path has 107 at most."""


@dataclass(frozen=True)
class _Work:
    """What one process writes down for the others."""

    job: Job
    missing: Missing
    sampled: int
    """Shards of the sample."""
    model: str
    """Digest of the model."""
    documents: str
    """Digest of the documents' ids and tokens."""


_WORK = TypeAdapter(_Work)


def make(job: Job, located: Located, batch: Batch, report: Report | None) -> None:
    """Make every shard that is missing, in this process or in several.

    Args:
        job: what they are made of.
        located: the model.
        batch: the documents and the plan of all shards.
        report: told the share done.

    Raises:
        InputError: the model cannot be used, here or where a worker is.
        RuntimeError: a worker failed, or died once too often; what is whole is kept.
    """
    missing = missing_of(job, batch)
    if not (missing.shards or missing.fits):
        return
    if job.scorer.ray is not None or job.scorer.processes > 1:
        work = _Work(_anywhere(job, located), missing, batch.sampled, located.digest, batch.digest)
        (_launch if job.scorer.ray is None else _map)(work, report)
    else:
        build_shards(job, load(job, located, batch), batch, missing, report)


def _anywhere(job: Job, located: Located) -> Job:
    """The same job for a process with another working directory, or on another kind of processor."""
    here = {"model": str(located.path)} if Path(located.spec).exists() else {}
    return replace(
        job, documents=job.documents.resolve(),
        specs=tuple(replace(spec, out=spec.out.resolve()) for spec in job.specs),
        scorer=job.scorer.model_copy(update={**here, "precision": precision_of(job.scorer)}),
    )  # fmt: skip


def _launch(work: _Work, _: Report | None) -> None:
    """Share the missing shards among processes of this machine; each writes its own."""
    scorer = work.job.scorer
    environment = {**os.environ, "OMP_NUM_THREADS": str(scorer.threads or 1)}
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "work.json"
        task.write_bytes(_WORK.dump_json(work))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                   str(scorer.processes), "-m", "tasks.scoring.worker", str(task)]  # fmt: skip
        done = subprocess.run(command, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"a scoring worker failed (exit {done.returncode}); the shards that are whole are kept")


def _map(work: _Work, report: Report | None) -> None:
    """Share the missing shards among Ray's workers: a process of its own maps them, and leaves nothing in this one."""
    scorer, out = work.job.scorer, work.job.specs[0].out
    assert scorer.ray is not None
    place = scorer.ray.temp or Path(tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="ray-", dir=place)
    given = {"work": _WORK.dump_json(work).decode(), "workers": scorer.processes, "ray": scorer.ray.plain(),
             "temp": folder}  # fmt: skip
    try:
        run_child("flows.distributed", given, out / "ray.log", label=work.job.label, unit="shards",
                  documents=len(work.missing.sample) + len(work.missing.shards), threads=scorer.threads or 1,
                  report=report)  # fmt: skip
    finally:
        for _ in range(100):  # where it was interrupted, the last of Ray's processes write until they end as well
            shutil.rmtree(folder, ignore_errors=True)
            if not Path(folder).exists():
                break
            time.sleep(0.1)


def require_runner(scorer: ScorerConfig) -> None:
    """Refuse at once a scorer whose processes cannot be started.

    Raises:
        InputError: Ray is asked for and not installed, or cannot be used as it is configured.
    """
    if scorer.ray is None:
        return
    if importlib.util.find_spec("prefect_ray") is None:
        raise InputError("Ray's workers need prefect-ray, which is not installed: pip install '.[ray]' in the checkout")
    if scorer.ray.address is not None and "PREFECT_API_URL" not in os.environ:
        raise InputError("the workers of a cluster need a Prefect server that all of them reach; start one and set "
                         "PREFECT_API_URL", field="ray.address")  # fmt: skip
    if scorer.ray.temp is not None and len(str(scorer.ray.temp.resolve())) > LONGEST_TEMP:
        raise InputError(f"is longer than {LONGEST_TEMP} characters, and the paths of Ray's sockets below it have a "
                         "limit; name a shorter one", file=scorer.ray.temp, field="ray.temp")  # fmt: skip


@lru_cache(maxsize=1)
def _opened(text: str) -> tuple[_Work, Batch, Readout]:
    """What another process wrote down, and what it takes to do it; once a process.

    Raises:
        InputError: the model or the documents are not the same here.
    """
    work = _WORK.validate_json(text)
    scorer = work.job.scorer
    located = locate(scorer.model, revision=scorer.revision)
    batch = read_batch(located, work.job.documents, scorer, work.job.samples)
    for what, found, wanted in (("model", located.digest, work.model), ("tokens", batch.digest, work.documents)):
        if found != wanted:
            raise InputError(f"the {what} on {socket.gethostname()} are not those of the machine that shares the work "
                             f"(digests {found[:16]}…, {wanted[:16]}…)", file=scorer.model)  # fmt: skip
    return work, batch, load(work.job, located, batch)


def work(task: Path) -> None:
    """One process's share of what :func:`_launch` wrote down; its rank is in the environment."""
    work, batch, readout = _opened(task.read_text(encoding="utf-8"))
    build_shards(work.job, readout, batch, work.missing, rank=int(os.environ["RANK"]),
                  world=int(os.environ["WORLD_SIZE"]))  # fmt: skip


Part = Literal["sample", "shards"]
"""What of the missing shards: those of the sample, or the index's own, for which the median must be fitted."""


def parts(text: str) -> list[Part]:
    """The parts of some work, in order; when the sample is whole, :func:`fit_sample` comes before the rest."""
    return ["sample", "shards"] if _WORK.validate_json(text).missing.fits else ["shards"]


def left(text: str) -> int:
    """How many of the missing shards are not whole yet."""
    work = _WORK.validate_json(text)
    sample = sum(not index.shard_done(work.job.sample, number) for number in work.missing.sample)
    return sample + sum(bool(work.job.lacking(number)) for number in work.missing.shards)


def make_share(text: str, part: Part, rank: int, world: int) -> None:
    """One worker's share of a part; shards that an earlier try has made are left out.

    Raises:
        InputError: the model or the documents are not the same here, or cannot be used.
    """
    work, batch, readout = _opened(text)
    mine = work.missing.share(rank, world)
    job = work.job
    build_shards(job, readout, batch, Missing(
        [number for number in mine.sample if part == "sample" and not index.shard_done(job.sample, number)],
        [number for number in mine.shards if part == "shards" and job.lacking(number)], fits=False,
    ))  # fmt: skip


def fit_sample(text: str) -> None:
    """Fit the median of an index of bits on its whole sample."""
    work = _WORK.validate_json(text)
    fit_median(work.job, work.sampled, work.missing, rank=0, world=1)
