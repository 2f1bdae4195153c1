"""Building indexes and adding to one: plan, forward passes shard by shard, manifest.

A build or an append that was killed goes on at its shard. Several indexes of the same documents share the forward pass,
and each has the bytes it would have had alone. An index of bits needs the pool's median before its first
shard can be packed: a sample of the documents makes up the first shards, which stand as fp32 in ``DIR/sample`` until
the median is fitted on them.
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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import TypeAdapter

from tasks.common.errors import InputError
from tasks.common.files import intact, read_json, sha256_file, write_json
from tasks.common.models import Located, load_causal_lm, locate, torch_dtype
from tasks.common.progress import Progress, Report
from tasks.scoring import calibration, index, store
from tasks.scoring.config import FitConfig, IndexType, ScorerConfig, SketchConfig, check_type
from tasks.scoring.plan import PIECE, Batch, pieces, read_batch
from tasks.scoring.rivals.child import run_child
from tasks.scoring.spread import write_spreads

if TYPE_CHECKING:
    from tasks.scoring.readout import Readout

VERSION = 2
"""Version of what the readout computes; part of every key made from it."""
SAMPLE = "sample"
APPEND = "append.json"
LONGEST_TEMP = 30
"""Characters of the place where Ray keeps its sockets: a socket's path has 107 at most."""
Losses = NDArray[np.float64] | None


@dataclass(frozen=True)
class IndexSpec:
    """One of the indexes that a forward pass makes."""

    out: Path
    """The index's directory."""
    sketch: SketchConfig | None
    """Algorithm 2's parameters; None makes no signatures (with losses: the perplexity baseline)."""
    stored: IndexType = "fp16"
    """Type of the stored signatures."""
    fit: FitConfig | None = None
    """Calibration to fit on these documents and to keep in the index; ``bit`` has median-bit by itself."""

    @property
    def dimension(self) -> int:
        """D, length of a signature; 0 without a sketch."""
        return self.sketch.dimension if self.sketch else 0

    def with_fit(self) -> IndexSpec:
        """The same with the calibration that its type has by itself.

        Raises:
            InputError: the type and the calibration do not go together.
        """
        fit = FitConfig() if self.stored == "bit" and self.fit is None else self.fit
        try:
            check_type(self.stored, fit.name if fit else "none")
        except ValueError as error:
            raise InputError(str(error)) from None
        return replace(self, fit=fit)


def build_index(
    documents: Path,
    out: Path,
    scorer: ScorerConfig,
    sketch: SketchConfig | None,
    *,
    stored: IndexType = "fp16",
    fit: FitConfig | None = None,
    losses: bool = False,
    data: str | None = None,
    label: str = "readout",
    report: Report | None = None,
) -> int:
    """Build the index of a Parquet file of documents, or go on with it: :func:`build_indexes` of one."""
    return build_indexes(documents, [IndexSpec(out, sketch, stored, fit)], scorer, losses=losses, data=data,
                         label=label, report=report)  # fmt: skip


def build_indexes(
    documents: Path,
    specs: Sequence[IndexSpec],
    scorer: ScorerConfig,
    *,
    losses: bool = False,
    data: str | None = None,
    label: str = "readout",
    report: Report | None = None,
) -> int:
    """Build several indexes of a Parquet file of documents by one forward pass, or go on with them.

    A shard that some of them lack is computed once and written to those.

    Args:
        documents: Parquet with doc_id and text.
        specs: the indexes, each in a directory of its own.
        scorer: the model and how it is run.
        losses: also keep each document's mean negative log-likelihood.
        data: SHA-256 of the file the documents came from; None takes that of ``documents``.
        label: shown beside the progress bar.
        report: told the share done.

    Returns:
        The number of documents.

    Raises:
        InputError: the model cannot be used, a type and a calibration do not go together, or a directory holds an index
            made of something else.
        ValueError: no index, one of bits among several, or two in one directory.
    """
    if not specs:
        raise ValueError("no index to build")
    require_runner(scorer)
    job = _Job(documents, tuple(spec.with_fit() for spec in specs), scorer, losses, label)
    if len(specs) > 1 and any(spec.stored == "bit" for spec in specs):
        raise ValueError("an index of bits is built alone: the sample that its median is fitted on makes up its first "
                         "shards")  # fmt: skip
    if len({spec.out for spec in specs}) < len(specs):
        raise ValueError("two of the indexes have the same directory")
    located = locate(scorer.model, revision=scorer.revision)
    batch = read_batch(located, documents, scorer, job.samples)
    for spec in job.specs:
        index.begin(spec.out, _identity(located, batch, scorer, spec, losses))
        if (spec.out / index.MANIFEST).exists():
            index.Index(spec.out).check_calibration()
    _make(job, located, batch, report)
    made_of = _made_of(located, scorer, documents, data)
    for spec in job.specs:
        if spec.fit is not None and spec.stored != "bit" and not intact(spec.out / index.CALIBRATION):
            whole = (index.written_shard(spec.out, number, spec.stored, spec.dimension)
                     for number in range(len(batch.plan)))  # fmt: skip
            blocks = (block for shard in whole for block in shard.blocks(PIECE))
            index.write_calibration(spec.out, calibration.fit(spec.fit.base, blocks))
        if spec.fit is not None and spec.fit.spread:
            write_spreads(spec.out, range(len(batch.plan)), spec.stored, spec.dimension, spec.fit)
        shutil.rmtree(spec.out / SAMPLE, ignore_errors=True)
        index.finish(spec.out, 0, len(batch.plan), made_of=made_of)
    return batch.count


def append_index(
    documents: Path,
    out: Path,
    scorer: ScorerConfig,
    *,
    data: str | None = None,
    new: bool = False,
    label: str = "readout",
    report: Report | None = None,
) -> int:
    """Add the documents of a Parquet file to a whole index, or go on with that; the shards it has stay as they are.

    The index can be read as it was until the append is whole. Its calibration stays the one that was fitted when it was
    built. The work is that of the new documents, and a look at the ids of the old ones unless they are known to be new.

    Args:
        documents: Parquet with doc_id and text.
        out: the index.
        scorer: the model the index was made with; see :func:`scorer_of`.
        data: SHA-256 of the file the documents came from; None takes that of ``documents``.
        new: the caller knows that the index has none of the documents.
        label: shown beside the progress bar.
        report: told the share done.

    Returns:
        The number of documents added.

    Raises:
        InputError: the model is another one, a document is in the index already, or an append of other documents is
            not finished.
    """
    require_runner(scorer)
    whole = index.Index(out)
    manifest = whole.manifest
    located = locate(scorer.model, revision=scorer.revision)
    given = {"model": located.digest, "precision": _precision(scorer), "max_length": scorer.max_length}
    for key, value in given.items():
        if manifest[key] != value:
            raise InputError(f"was made with {key} = {manifest[key]}, not {value}", file=out)
    batch = read_batch(located, documents, scorer, None)
    if _added(out, manifest, batch):
        (out / APPEND).unlink()
        return batch.count
    if not new:
        _refuse_known(whole, batch.groups[0].doc_ids)
    whole.check_calibration()
    first = len(whole.shards)
    _claim_append(out, {"first": first, "documents": batch.digest, "batch_tokens": scorer.batch_tokens,
                        "shard_tokens": scorer.shard_tokens})  # fmt: skip
    plan = read_json(out / index.PLAN)
    spec = IndexSpec(out, SketchConfig(**plan["sketch"]) if plan["sketch"] else None, whole.stored,
                     FitConfig(**plan["calibration"]) if "calibration" in plan else None)  # fmt: skip
    _make(_Job(documents, (spec,), scorer, plan["losses"], label, first), located, batch, report)
    if spec.fit is not None and spec.fit.spread:
        write_spreads(out, range(first, first + len(batch.plan)), spec.stored, spec.dimension, spec.fit)
    index.finish(out, len(manifest["batches"]), len(batch.plan), made_of=_made_of(located, scorer, documents, data))
    (out / APPEND).unlink()
    return batch.count


def scorer_of(whole: index.Index, *, model: str | None = None, **how: Any) -> ScorerConfig:
    """The scorer that an index was made with.

    Args:
        whole: the index.
        model: where the same model lies now; None takes the place it was read from.
        how: fields of :class:`ScorerConfig` that change no signature: batch_tokens, shard_tokens, processes, threads,
            device_map.

    Raises:
        InputError: the model there is another one.
    """
    manifest = whole.manifest
    made = manifest["scorer"]
    spec, revision = (made["model"], made["revision"]) if model is None else (model, None)
    if locate(spec, revision=revision).digest != manifest["model"]:
        raise InputError(f"is not the model that the index {whole.directory} was made with "
                         f"(digest {manifest['model'][:16]}…)", file=spec)  # fmt: skip
    return ScorerConfig(model=spec, revision=revision, precision=manifest["precision"],
                        max_length=manifest["max_length"],
                        **{"batch_tokens": manifest["batch_tokens"], "shard_tokens": manifest["shard_tokens"], **how})


def query_index(whole: index.Index, documents: Path, out: Path, *, model: str | None = None) -> index.Index:
    """The fp32 signatures of a Parquet file of documents, made as those of an index were; not calibrated.

    Raises:
        InputError: as :func:`scorer_of`, or the index holds no signatures.
    """
    if whole.manifest["sketch"] is None:
        raise InputError("holds no signatures", file=whole.directory)
    sketch = SketchConfig(**whole.manifest["sketch"])
    build_index(documents, out, scorer_of(whole, model=model), sketch, stored="fp32", label="queries")
    return index.Index(out)


def _identity(located: Located, batch: Batch, scorer: ScorerConfig, spec: IndexSpec, losses: bool) -> dict[str, Any]:
    """All that decides the index's bytes."""
    return {
        "model": located.digest,
        "precision": _precision(scorer),
        "max_length": scorer.max_length,
        "batch_tokens": scorer.batch_tokens,
        "shard_tokens": scorer.shard_tokens,
        "sketch": spec.sketch.plain() if spec.sketch else None,
        "type": spec.stored,
        "losses": losses,
        "documents": batch.digest,
        **({"calibration": spec.fit.plain()} if spec.fit else {}),
    }


def _precision(scorer: ScorerConfig) -> str:
    return str(torch_dtype(scorer.precision)).removeprefix("torch.")


def _made_of(located: Located, scorer: ScorerConfig, documents: Path, data: str | None) -> dict[str, Any]:
    """What a manifest notes beside the identity: where the model was read from, and the batch's file."""
    here = Path(located.spec).exists()
    return {"scorer": {"model": str(located.path) if here else located.spec, "revision": scorer.revision},
            "data": data or sha256_file(documents)}  # fmt: skip


def _refuse_known(whole: index.Index, doc_ids: tuple[str, ...]) -> None:
    new = pa.array(doc_ids, pa.string())
    for shard in whole.shards:
        old = shard.doc_ids()
        known = old.filter(pc.is_in(old, value_set=new))
        if len(known):
            raise InputError(f"holds the document {known[0].as_py()} already; leave it out of the data",
                             file=whole.directory, field="id")  # fmt: skip


def _added(out: Path, manifest: dict[str, Any], batch: Batch) -> bool:
    """Whether an append of these documents was killed when the index was whole already."""
    try:
        begun = read_json(out / APPEND)
    except FileNotFoundError:
        return False
    shards: int = begun["first"] + manifest["batches"][-1]["shards"]
    return begun["documents"] == batch.digest and shards == len(manifest["shards"])


def _claim_append(out: Path, claim: dict[str, Any]) -> None:
    """Note what is being added, or go on with it; what an append that was given up left behind is removed."""
    try:
        begun = read_json(out / APPEND)
    except FileNotFoundError:
        begun = None
    if begun == claim:
        return
    if begun is not None and begun["first"] == claim["first"]:
        raise InputError("other documents are being added to this index; give those again to go on with them, or "
                         "remove this file to give them up", file=out / APPEND)  # fmt: skip
    index.remove_shards(out, claim["first"])
    write_json(out / APPEND, claim, checked=True)


@dataclass(frozen=True)
class _Job:
    """What shards are made of, the same in every process that shares them."""

    documents: Path
    specs: tuple[IndexSpec, ...]
    scorer: ScorerConfig
    losses: bool
    label: str
    first: int = 0
    """Number of the batch's first shard in the index."""

    @property
    def bits(self) -> IndexSpec | None:
        """The index of bits, where it is one: the only one."""
        return self.specs[0] if self.specs[0].stored == "bit" else None

    @property
    def samples(self) -> FitConfig | None:
        """The fit of the bits' median, where this batch brings the sample for it."""
        return self.bits.fit if self.bits and self.first == 0 else None

    @property
    def sample(self) -> Path:
        """Where the shards of the sample stand as fp32."""
        return self.specs[0].out / SAMPLE

    def lacking(self, number: int) -> list[IndexSpec]:
        """The indexes that lack a shard, counted from the batch's first."""
        return [spec for spec in self.specs if not index.shard_done(spec.out, self.first + number)]


@dataclass(frozen=True)
class _Missing:
    """Shards to be made, counted from the batch's first."""

    sample: list[int]
    """Those of the sample that are missing as fp32; empty once the median is fitted."""
    shards: list[int]
    fits: bool
    """Whether the median is still to be fitted."""

    def share(self, rank: int, world: int) -> _Missing:
        """What one of ``world`` processes makes."""
        return _Missing(self.sample[rank::world], self.shards[rank::world], self.fits)


@dataclass(frozen=True)
class _Work:
    """What one process writes down for the others."""

    job: _Job
    missing: _Missing
    sampled: int
    """Shards of the sample."""
    model: str
    """Digest of the model."""
    documents: str
    """Digest of the documents' ids and tokens."""


_WORK = TypeAdapter(_Work)


def _make(job: _Job, located: Located, batch: Batch, report: Report | None) -> None:
    """Make every shard that is missing, in this process or in several."""
    fits = job.samples is not None and not intact(job.specs[0].out / index.CALIBRATION)
    missing = _Missing(
        [number for number in range(batch.sampled) if fits and not index.shard_done(job.sample, number)],
        [number for number in range(len(batch.plan)) if job.lacking(number)], fits,
    )  # fmt: skip
    if not (missing.shards or missing.fits):
        return
    if job.scorer.ray is not None or job.scorer.processes > 1:
        work = _Work(_anywhere(job, located), missing, batch.sampled, located.digest, batch.digest)
        (_launch if job.scorer.ray is None else _map)(work, report)
    else:
        _build_shards(job, _load(job, located, batch), batch, missing, report)


def _load(job: _Job, located: Located, batch: Batch) -> Readout:
    """The model on this process's device."""
    import torch

    from tasks.scoring.readout import Readout

    scorer = job.scorer
    if scorer.threads is not None:
        torch.set_num_threads(scorer.threads)
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model = load_causal_lm(located, dtype=torch_dtype(scorer.precision), device_map=scorer.device_map)
    readout = Readout(model, located.spec)
    if readout.positions is not None and batch.longest > readout.positions:
        raise InputError(f"the scorer has {readout.positions} positions, a document {batch.longest} tokens; cut "
                         f"documents at {readout.positions}", file=located.spec, field="max_length")  # fmt: skip
    return readout


def _build_shards(
    job: _Job, readout: Readout, batch: Batch, missing: _Missing, report: Report | None = None, *, rank: int = 0,
    world: int = 1,
) -> None:  # fmt: skip
    """Make one process's share of the missing shards."""
    from tasks.scoring.engine import forward
    from tasks.scoring.rise import Sketcher

    scorer, mine = job.scorer, missing.share(rank, world)
    # Indexes of one sketch in several types share its signatures.
    sketchers = {sketch: Sketcher(readout.head, sketch) for sketch in _sketches(job.specs)}
    kept = {number for number in range(batch.sampled) if index.shard_done(job.sample, number)}
    ahead = {*mine.sample, *(number for number in mine.shards if number not in {*kept, *missing.sample})}
    total = sum(batch.tokens(number) for number in range(len(batch.plan)))
    done = total - sum(batch.tokens(number) for number in ahead)

    def read(number: int, into: Sequence[tuple[IndexSpec, store.Encoder]]) -> Losses:
        """The forward pass over one shard; its float32 signatures stand for a few batches at a time."""
        documents, places = batch.plan[number]
        asked = _sketches([spec for spec, _ in into])
        losses: list[NDArray[np.float64]] = []
        for some in pieces(documents, places, scorer.batch_tokens):
            made = forward(readout, documents, some, batch_tokens=scorer.batch_tokens, losses=job.losses,
                           sketchers=[sketchers[sketch] for sketch in asked], count=progress.add)  # fmt: skip
            phi = dict(zip(asked, made.signatures, strict=True))
            for spec, encoder in into:
                encoder.add(phi[spec.sketch] if spec.sketch else np.zeros((len(some), 0), dtype=np.float32))
            losses += [] if made.losses is None else [made.losses]
        return np.concatenate(losses) if losses else None

    def write(out: Path, name: int, number: int, encoded: store.Encoder, losses: Losses) -> None:
        documents, places = batch.plan[number]
        index.write_shard(out, name, encoded=encoded, doc_ids=[documents.doc_ids[place] for place in places],
                          n_tokens=documents.lengths(places), losses=losses)  # fmt: skip

    with Progress(job.label, total, "tokens", done=done, report=report) as progress:
        for number in mine.sample:
            encoded = store.Encoder(len(batch.plan[number][1]), "fp32")
            losses = read(number, [(job.specs[0], encoded)])
            write(job.sample, number, number, encoded, losses)
        fitted = _median(job, batch.sampled, missing, rank, world) if missing.fits or mine.shards else None
        for number in mine.shards:
            rows = len(batch.plan[number][1])
            into = [(spec, store.Encoder(rows, spec.stored, fitted)) for spec in job.lacking(number)]
            sampled = number < batch.sampled and index.shard_done(job.sample, number)
            losses = _from_sample(job, number, into[0][1]) if sampled else read(number, into)
            for spec, encoded in into:
                write(spec.out, job.first + number, number, encoded, losses)


def _sketches(specs: Sequence[IndexSpec]) -> list[SketchConfig]:
    """The different sketches of some indexes, in order."""
    return list(dict.fromkeys(spec.sketch for spec in specs if spec.sketch is not None))


def _median(job: _Job, sampled: int, missing: _Missing, rank: int, world: int) -> calibration.MedianBit | None:
    """The median of an index of bits, fitted when the whole sample stands; None for another type."""
    if job.bits is None or job.bits.fit is None:
        return None
    name = job.bits.fit.base
    if missing.fits:
        if world > 1:
            _wait_for_others()
        sample = [_sample_shard(job, number) for number in range(sampled)]
        fitted = calibration.fit(name, (block for shard in sample for block in shard.blocks(PIECE)))
        if rank == 0:
            index.write_calibration(job.bits.out, fitted)
    else:
        fitted = index.read_calibration(job.bits.out, name)
    if not isinstance(fitted, calibration.MedianBit):
        raise TypeError(f"an index of bits with the calibration {name}")
    return fitted


def _wait_for_others() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()


def _sample_shard(job: _Job, number: int) -> index.Shard:
    return index.written_shard(job.sample, number, "fp32", job.specs[0].dimension)


def _from_sample(job: _Job, number: int, into: store.Encoder) -> Losses:
    """What the forward pass over a shard of the sample made."""
    shard = _sample_shard(job, number)
    for block in shard.blocks(PIECE):
        into.add(block)
    return shard.documents().column("loss").to_numpy(zero_copy_only=False) if job.losses else None


def _anywhere(job: _Job, located: Located) -> _Job:
    """The same job for a process with another working directory, or on another kind of processor."""
    here = {"model": str(located.path)} if Path(located.spec).exists() else {}
    return replace(
        job, documents=job.documents.resolve(),
        specs=tuple(replace(spec, out=spec.out.resolve()) for spec in job.specs),
        scorer=job.scorer.model_copy(update={**here, "precision": _precision(job.scorer)}),
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
    return work, batch, _load(work.job, located, batch)


def work(task: Path) -> None:
    """One process's share of what :func:`_launch` wrote down; its rank is in the environment."""
    work, batch, readout = _opened(task.read_text(encoding="utf-8"))
    _build_shards(work.job, readout, batch, work.missing, rank=int(os.environ["RANK"]),
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
    """One worker's share of a part; shards that an earlier try has made are left out."""
    work, batch, readout = _opened(text)
    mine = work.missing.share(rank, world)
    job = work.job
    _build_shards(job, readout, batch, _Missing(
        [number for number in mine.sample if part == "sample" and not index.shard_done(job.sample, number)],
        [number for number in mine.shards if part == "shards" and job.lacking(number)], fits=False,
    ))  # fmt: skip


def fit_sample(text: str) -> None:
    """Fit the median of an index of bits on its whole sample."""
    work = _WORK.validate_json(text)
    _median(work.job, work.sampled, work.missing, rank=0, world=1)
