"""Building an index and adding to it: plan, forward passes shard by shard, manifest.

A build or an append that was killed goes on at its shard. An index of bits needs the pool's median before its first
shard can be packed: a sample of the documents makes up the first shards, which stand as fp32 in ``DIR/sample`` until
the median is fitted on them.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.files import read_json, sha256_file, write_json
from tasks.common.models import Located, load_causal_lm, load_tokenizer, locate, torch_dtype
from tasks.common.progress import Progress, Report
from tasks.scoring import calibration, index, store
from tasks.scoring.batching import Tokenized, batches, shards, tokenize
from tasks.scoring.config import FitConfig, IndexType, ScorerConfig, SketchConfig, check_type

VERSION = 2
"""Version of what the readout computes; part of every key made from it."""
SAMPLE = "sample"
APPEND = "append.json"
_PIECE = 256
"""Documents whose float32 signatures stand in memory at once; those of one batch where that has more."""
Losses = NDArray[np.float64] | None


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
    """Build the index of a Parquet file of documents, or go on with it.

    Args:
        documents: Parquet with doc_id and text.
        out: the index's directory.
        scorer: the model and how it is run.
        sketch: Algorithm 2's parameters; None makes no signatures (with ``losses``: the perplexity baseline).
        stored: type of the stored signatures.
        fit: calibration to fit on these documents and to keep in the index; ``bit`` has median-bit by itself.
        losses: also keep each document's mean negative log-likelihood.
        data: SHA-256 of the file the documents came from; None takes that of ``documents``.
        label: shown beside the progress bar.
        report: told the share done.

    Returns:
        The number of documents.

    Raises:
        InputError: the model cannot be used, or ``out`` holds an index made of something else.
    """
    if stored == "bit" and fit is None:
        fit = FitConfig()
    try:
        check_type(stored, fit.name if fit else "none")
    except ValueError as error:
        raise InputError(str(error)) from None
    located = locate(scorer.model, revision=scorer.revision)
    batch = _read_batch(located, documents, scorer, fit if stored == "bit" else None)
    index.begin(out, _identity(located, batch, scorer, sketch, stored, fit, losses))
    _make(_Job(documents, out, scorer, sketch, stored, fit, losses, label), located, batch, report)
    if fit is not None and stored != "bit" and not (out / index.CALIBRATION).exists():
        dimension = sketch.dimension if sketch else 0
        whole = (index.written_shard(out, number, stored, dimension) for number in range(len(batch.plan)))
        blocks = (block for shard in whole for block in shard.blocks(_PIECE))
        index.write_calibration(out, calibration.fit(fit.name, blocks))
    index.finish(out, 0, len(batch.plan), made_of=_made_of(located, scorer, documents, data))
    shutil.rmtree(out / SAMPLE, ignore_errors=True)
    return batch.count


def append_index(
    documents: Path,
    out: Path,
    scorer: ScorerConfig,
    *,
    data: str | None = None,
    label: str = "readout",
    report: Report | None = None,
) -> int:
    """Add the documents of a Parquet file to a whole index, or go on with that; the shards it has stay as they are.

    The index can be read as it was until the append is whole. Its calibration stays the one that was fitted when it was
    built. The work is that of the new documents, and a look at the ids of the old ones.

    Args:
        documents: Parquet with doc_id and text.
        out: the index.
        scorer: the model the index was made with; see :func:`scorer_of`.
        data: SHA-256 of the file the documents came from; None takes that of ``documents``.
        label: shown beside the progress bar.
        report: told the share done.

    Returns:
        The number of documents added.

    Raises:
        InputError: the model is another one, a document is in the index already, or an append of other documents is
            not finished.
    """
    whole = index.Index(out)
    manifest = whole.manifest
    located = locate(scorer.model, revision=scorer.revision)
    given = {"model": located.digest, "precision": _precision(scorer), "max_length": scorer.max_length}
    for key, value in given.items():
        if manifest[key] != value:
            raise InputError(f"was made with {key} = {manifest[key]}, not {value}", file=out)
    batch = _read_batch(located, documents, scorer, None)
    _refuse_known(whole, batch.groups[0].doc_ids)
    whole.check_calibration()
    first = len(whole.shards)
    _claim_append(out, {"first": first, "documents": batch.digest, "batch_tokens": scorer.batch_tokens,
                        "shard_tokens": scorer.shard_tokens})  # fmt: skip
    plan = read_json(out / index.PLAN)
    job = _Job(documents, out, scorer, SketchConfig(**plan["sketch"]) if plan["sketch"] else None, whole.stored,
               FitConfig(**plan["calibration"]) if "calibration" in plan else None, plan["losses"], label, first)
    _make(job, located, batch, report)
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


@dataclass(frozen=True)
class _Batch:
    """Tokenized documents and how they are cut into shards."""

    groups: list[Tokenized]
    """The sample that a median is fitted on, where there is one, and the others."""
    plan: list[tuple[Tokenized, range]]
    """The documents of each shard; those of the sample come first."""
    sampled: int
    """Shards of the sample."""
    digest: str
    """SHA-256 over all ids and tokens."""

    @property
    def count(self) -> int:
        """Number of documents."""
        return sum(map(len, self.groups))

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(group.length(len(group) - 1) for group in self.groups if len(group))

    def tokens(self, number: int) -> int:
        """Tokens of one shard, counted from the batch's first."""
        documents, places = self.plan[number]
        return sum(documents.lengths(places))


def _read_batch(located: Located, documents: Path, scorer: ScorerConfig, fit: FitConfig | None) -> _Batch:
    """Read, tokenize and cut; with ``fit``, the documents whose hashed texts come first make up the first shards."""
    doc_ids, texts = (pq.read_table(documents, columns=[name]).column(0).to_pylist() for name in ("doc_id", "text"))
    tokenized = tokenize(load_tokenizer(located), doc_ids, texts, scorer.max_length)
    groups = [tokenized]
    if fit is not None:
        drawn = heapq.nsmallest(fit.documents, ((hashlib.sha256(f"{fit.seed}/{text}".encode()).digest(), doc_id)
                                                for doc_id, text in zip(doc_ids, texts, strict=True)))  # fmt: skip
        sample = {doc_id for _, doc_id in drawn}
        groups = [_taken(tokenized, [place for place, doc_id in enumerate(tokenized.doc_ids)
                                     if (doc_id in sample) is inside]) for inside in (True, False)]  # fmt: skip
    cuts = [[(group, places) for places in shards(group, scorer.shard_tokens)] for group in groups]
    return _Batch(groups, [cut for group in cuts for cut in group], len(cuts[0]) if fit else 0, tokenized.digest())


def _taken(documents: Tokenized, places: list[int]) -> Tokenized:
    return Tokenized.of([documents.doc_ids[place] for place in places], [documents.ids(place) for place in places])


def _identity(
    located: Located, batch: _Batch, scorer: ScorerConfig, sketch: SketchConfig | None, stored: IndexType,
    fit: FitConfig | None, losses: bool,
) -> dict[str, Any]:  # fmt: skip
    """All that decides the index's bytes."""
    return {
        "model": located.digest,
        "precision": _precision(scorer),
        "max_length": scorer.max_length,
        "batch_tokens": scorer.batch_tokens,
        "shard_tokens": scorer.shard_tokens,
        "sketch": sketch.plain() if sketch else None,
        "type": stored,
        "losses": losses,
        "documents": batch.digest,
        **({"calibration": fit.plain()} if fit else {}),
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
    write_json(out / APPEND, claim)


@dataclass(frozen=True)
class _Job:
    """What shards are made of, the same in every process that shares them."""

    documents: Path
    out: Path
    scorer: ScorerConfig
    sketch: SketchConfig | None
    stored: IndexType
    fit: FitConfig | None
    losses: bool
    label: str
    first: int = 0
    """Number of the batch's first shard in the index."""

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return {"documents": str(self.documents), "out": str(self.out), "scorer": self.scorer.plain(),
                "sketch": self.sketch.plain() if self.sketch else None, "stored": self.stored,
                "fit": self.fit.plain() if self.fit else None, "losses": self.losses, "label": self.label,
                "first": self.first}  # fmt: skip

    @classmethod
    def of(cls, plain: dict[str, Any]) -> _Job:
        """From what :meth:`plain` gave."""
        return cls(**{
            **plain, "documents": Path(plain["documents"]), "out": Path(plain["out"]),
            "scorer": ScorerConfig(**plain["scorer"]),
            "sketch": SketchConfig(**plain["sketch"]) if plain["sketch"] else None,
            "fit": FitConfig(**plain["fit"]) if plain["fit"] else None,
        })  # fmt: skip

    @property
    def samples(self) -> bool:
        """Whether this batch brings the sample that the bits' median is fitted on."""
        return self.stored == "bit" and self.first == 0


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


def _make(job: _Job, located: Located, batch: _Batch, report: Report | None) -> None:
    """Make every shard that is missing, in this process or in several."""
    fits = job.samples and not (job.out / index.CALIBRATION).exists()
    missing = _Missing(
        [number for number in range(batch.sampled) if fits and not index.shard_done(job.out / SAMPLE, number)],
        [number for number in range(len(batch.plan)) if not index.shard_done(job.out, job.first + number)], fits,
    )  # fmt: skip
    if not (missing.shards or missing.fits):
        return
    if job.scorer.processes > 1:
        _launch(job, missing)
    else:
        _build_shards(job, located, batch, missing, report)


def _build_shards(
    job: _Job, located: Located, batch: _Batch, missing: _Missing, report: Report | None = None, *, rank: int = 0,
    world: int = 1,
) -> None:  # fmt: skip
    """Make one process's share of the missing shards."""
    import torch

    from tasks.scoring.engine import forward
    from tasks.scoring.readout import Readout
    from tasks.scoring.rise import Sketcher

    scorer, mine = job.scorer, missing.share(rank, world)
    if scorer.threads is not None:
        torch.set_num_threads(scorer.threads)
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model = load_causal_lm(located, dtype=torch_dtype(scorer.precision), device_map=scorer.device_map)
    readout = Readout(model, located.spec)
    if readout.positions is not None and batch.longest > readout.positions:
        raise InputError(f"the scorer has {readout.positions} positions, a document {batch.longest} tokens; cut "
                         f"documents at {readout.positions}", file=located.spec, field="max_length")  # fmt: skip
    sketcher = Sketcher(readout.head, job.sketch) if job.sketch else None
    kept = {number for number in range(batch.sampled) if index.shard_done(job.out / SAMPLE, number)}
    ahead = {*mine.sample, *(number for number in mine.shards if number not in {*kept, *missing.sample})}
    total = sum(batch.tokens(number) for number in range(len(batch.plan)))
    done = total - sum(batch.tokens(number) for number in ahead)

    def read(number: int, into: store.Encoder) -> Losses:
        """The forward pass over one shard; its float32 signatures stand for a few batches at a time."""
        documents, places = batch.plan[number]
        losses: list[NDArray[np.float64]] = []
        for some in _pieces(documents, places, scorer.batch_tokens):
            made = forward(readout, documents, some, batch_tokens=scorer.batch_tokens, sketcher=sketcher,
                           losses=job.losses, count=progress.add)  # fmt: skip
            into.add(np.zeros((len(some), 0), dtype=np.float32) if made.signatures is None else made.signatures)
            losses += [] if made.losses is None else [made.losses]
        return np.concatenate(losses) if losses else None

    def write(out: Path, name: int, number: int, encoded: store.Encoder, losses: Losses) -> None:
        documents, places = batch.plan[number]
        index.write_shard(out, name, encoded=encoded, doc_ids=[documents.doc_ids[place] for place in places],
                          n_tokens=documents.lengths(places), losses=losses)  # fmt: skip

    with Progress(job.label, total, "tokens", done=done, report=report) as progress:
        for number in mine.sample:
            encoded = store.Encoder(len(batch.plan[number][1]), "fp32")
            losses = read(number, encoded)
            write(job.out / SAMPLE, number, number, encoded, losses)
        fitted = _median(job, batch, missing, rank, world)
        for number in mine.shards:
            encoded = store.Encoder(len(batch.plan[number][1]), job.stored, fitted)
            sampled = number < batch.sampled and index.shard_done(job.out / SAMPLE, number)
            losses = _from_sample(job, number, encoded) if sampled else read(number, encoded)
            write(job.out, job.first + number, number, encoded, losses)


def _pieces(documents: Tokenized, places: range, batch_tokens: int) -> Iterator[range]:
    """Consecutive batches of a shard together, up to some hundred documents: the batches are those of the shard."""
    start = stop = places.start
    for batch in batches(documents, places, batch_tokens):
        if stop > start and batch.stop - start > _PIECE:
            yield range(start, stop)
            start = stop
        stop = batch.stop
    yield range(start, stop)


def _median(job: _Job, batch: _Batch, missing: _Missing, rank: int, world: int) -> calibration.MedianBit | None:
    """The median of an index of bits, fitted when the whole sample stands; None for another type."""
    if job.fit is None or job.stored != "bit":
        return None
    if missing.fits:
        if world > 1:
            _wait_for_others()
        sample = [_sample_shard(job, number) for number in range(batch.sampled)]
        fitted = calibration.fit(job.fit.name, (block for shard in sample for block in shard.blocks(_PIECE)))
        if rank == 0:
            index.write_calibration(job.out, fitted)
    else:
        fitted = index.read_calibration(job.out, job.fit.name)
    if not isinstance(fitted, calibration.MedianBit):
        raise TypeError(f"an index of bits with the calibration {job.fit.name}")
    return fitted


def _wait_for_others() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()


def _sample_shard(job: _Job, number: int) -> index.Shard:
    return index.written_shard(job.out / SAMPLE, number, "fp32", job.sketch.dimension if job.sketch else 0)


def _from_sample(job: _Job, number: int, into: store.Encoder) -> Losses:
    """What the forward pass over a shard of the sample made."""
    shard = _sample_shard(job, number)
    for block in shard.blocks(_PIECE):
        into.add(block)
    return shard.documents().column("loss").to_numpy(zero_copy_only=False) if job.losses else None


def _launch(job: _Job, missing: _Missing) -> None:
    """Share the missing shards among processes; each writes its own."""
    spec = job.out / "workers.json"
    write_json(spec, {"job": job.plain(), "missing": vars(missing)})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               str(job.scorer.processes), "-m", "tasks.scoring.worker", str(spec)]  # fmt: skip
    done = subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": str(job.scorer.threads or 1)})
    spec.unlink()
    if done.returncode != 0:
        raise RuntimeError(f"a scoring worker failed (exit {done.returncode}); the shards that are whole are kept")


def work(spec: Path) -> None:
    """One process's share of what :func:`_launch` wrote down; its rank is in the environment."""
    given = read_json(spec)
    job, missing = _Job.of(given["job"]), _Missing(**given["missing"])
    located = locate(job.scorer.model, revision=job.scorer.revision)
    batch = _read_batch(located, job.documents, job.scorer, job.fit if job.samples else None)
    _build_shards(job, located, batch, missing, rank=int(os.environ["RANK"]), world=int(os.environ["WORLD_SIZE"]))
