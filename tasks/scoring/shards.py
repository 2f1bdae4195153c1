"""Making the missing shards of indexes: forward passes over the documents, the sample's median, files.

Several indexes of the same documents share the forward pass, and each has the bytes it would have had alone. An index
of bits needs the pool's median before its first shard can be packed: a sample of the documents makes up the first
shards, which stand as fp32 in ``DIR/sample`` until the median is fitted on them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.files import intact
from tasks.common.models import Located, load_causal_lm, torch_dtype
from tasks.common.progress import Progress, Report
from tasks.scoring import calibration, index, store
from tasks.scoring.config import FitConfig, IndexType, ScorerConfig, SketchConfig, check_type
from tasks.scoring.plan import PIECE, Batch, pieces

if TYPE_CHECKING:
    from tasks.scoring.readout import Readout

SAMPLE = "sample"
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


@dataclass(frozen=True)
class Job:
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
class Missing:
    """Shards to be made, counted from the batch's first."""

    sample: list[int]
    """Those of the sample that are missing as fp32; empty once the median is fitted."""
    shards: list[int]
    fits: bool
    """Whether the median is still to be fitted."""

    def share(self, rank: int, world: int) -> Missing:
        """What one of ``world`` processes makes."""
        return Missing(self.sample[rank::world], self.shards[rank::world], self.fits)


def missing_of(job: Job, batch: Batch) -> Missing:
    """What of a batch's shards is not whole."""
    fits = job.samples is not None and not intact(job.specs[0].out / index.CALIBRATION)
    return Missing(
        [number for number in range(batch.sampled) if fits and not index.shard_done(job.sample, number)],
        [number for number in range(len(batch.plan)) if job.lacking(number)], fits,
    )  # fmt: skip


def precision_of(scorer: ScorerConfig) -> str:
    """Name of the type that a scorer runs in here."""
    return str(torch_dtype(scorer.precision)).removeprefix("torch.")


def load(job: Job, located: Located, batch: Batch) -> Readout:
    """The model on this process's device.

    Raises:
        InputError: it cannot be loaded, or has fewer positions than the longest document.
    """
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


def build_shards(
    job: Job, readout: Readout, batch: Batch, missing: Missing, report: Report | None = None, *, rank: int = 0,
    world: int = 1,
) -> None:  # fmt: skip
    """Make one process's share of the missing shards.

    Args:
        job: what they are made of.
        readout: the model.
        batch: the documents and the plan of all shards.
        missing: the shards that all processes together make.
        report: told the share done.
        rank: of this process among ``world``.
        world: processes that share them.
    """
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
        fitted = fit_median(job, batch.sampled, missing, rank, world) if missing.fits or mine.shards else None
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


def fit_median(job: Job, sampled: int, missing: Missing, rank: int, world: int) -> calibration.MedianBit | None:
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


def _sample_shard(job: Job, number: int) -> index.Shard:
    return index.written_shard(job.sample, number, "fp32", job.specs[0].dimension)


def _from_sample(job: Job, number: int, into: store.Encoder) -> Losses:
    """What the forward pass over a shard of the sample made."""
    shard = _sample_shard(job, number)
    for block in shard.blocks(PIECE):
        into.add(block)
    return shard.documents().column("loss").to_numpy(zero_copy_only=False) if job.losses else None
