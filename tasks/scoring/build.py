"""Building indexes and adding to one: claim, plan, missing shards, manifest.

A build or an append that was killed goes on at its shard.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks.common.errors import InputError
from tasks.common.files import intact, read_json, sha256_file, write_json
from tasks.common.models import Located, locate
from tasks.common.progress import Report
from tasks.scoring import calibration, index
from tasks.scoring.config import FitConfig, IndexType, ScorerConfig, SketchConfig
from tasks.scoring.plan import PIECE, Batch, read_batch
from tasks.scoring.shards import SAMPLE, IndexSpec, Job, precision_of
from tasks.scoring.share import make, require_runner
from tasks.scoring.spread import write_spreads

VERSION = 2
"""Version of what the readout computes; part of every key made from it."""
APPEND = "append.json"


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
    job = Job(documents, tuple(spec.with_fit() for spec in specs), scorer, losses, label)
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
    make(job, located, batch, report)
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
    given = {"model": located.digest, "precision": precision_of(scorer), "max_length": scorer.max_length}
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
    make(Job(documents, (spec,), scorer, plan["losses"], label, first), located, batch, report)
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
        "precision": precision_of(scorer),
        "max_length": scorer.max_length,
        "batch_tokens": scorer.batch_tokens,
        "shard_tokens": scorer.shard_tokens,
        "sketch": spec.sketch.plain() if spec.sketch else None,
        "type": spec.stored,
        "losses": losses,
        "documents": batch.digest,
        **({"calibration": spec.fit.plain()} if spec.fit else {}),
    }


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
