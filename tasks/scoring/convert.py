"""An index made from another one: the same signatures in another type, without a forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.common.errors import InputError
from tasks.common.files import intact, read_json, sha256_json
from tasks.scoring import calibration, index, store
from tasks.scoring.config import FitConfig, IndexType
from tasks.scoring.index import Index
from tasks.scoring.shards import IndexSpec
from tasks.scoring.spread import sample, write_spreads

_ROWS = 256
"""Documents whose float32 signatures stand in memory at once."""


def convert_index(source: Index, out: Path, *, stored: IndexType, fit: FitConfig | None = None) -> int:
    """Make an index of another type from a whole one, shard by shard, or go on with it.

    The calibration is fitted on the source's signatures: ``median-bit`` on a sample drawn by the hashed ids, another
    on all of them.

    Args:
        source: an index of floats or of 8 bits; one of bits has nothing left to convert.
        out: the new index's directory.
        stored: its type.
        fit: calibration to fit and to keep in it; ``bit`` has median-bit by itself.

    Returns:
        The number of documents.

    Raises:
        InputError: the source holds bits or no signatures, or ``out`` holds another index.
    """
    if source.stored == "bit":
        raise InputError("holds bits, which no other type can be made from", file=source.directory)
    if source.manifest["sketch"] is None:
        raise InputError("holds no signatures", file=source.directory)
    fit = IndexSpec(out, None, stored, fit).with_fit().fit
    index.begin(out, _identity(source, stored, fit))
    if (out / index.MANIFEST).exists():
        Index(out).check_calibration()
    fitted = None
    if fit is not None:
        if not intact(out / index.CALIBRATION):
            places = sample(source.doc_ids, fit.documents, fit.seed)
            blocks = [source.signatures(places)] if fit.base == calibration.MEDIAN_BIT else source.blocks(_ROWS)
            index.write_calibration(out, calibration.fit(fit.base, blocks))
        fitted = index.read_calibration(out, fit.name)
    median = fitted if isinstance(fitted, calibration.MedianBit) else None
    for shard in source.shards:
        if index.shard_done(out, shard.number):
            continue
        encoded = store.Encoder(len(shard), stored, median)
        for block in shard.blocks(_ROWS):
            encoded.add(block)
        documents = shard.documents()
        losses = documents.column("loss")
        index.write_shard(out, shard.number, encoded=encoded, doc_ids=documents.column("doc_id").to_pylist(),
                          n_tokens=documents.column("n_tokens").to_pylist(),
                          losses=None if losses.null_count else losses.to_numpy(zero_copy_only=False))  # fmt: skip
    if fit is not None and fit.spread:
        write_spreads(out, range(len(source.shards)), stored, source.dimension, fit)
    for number, batch in enumerate(source.manifest["batches"]):
        index.finish(out, number, batch["shards"], made_of={"scorer": source.manifest["scorer"], "data": batch["data"]})
    return len(source)


def _identity(source: Index, stored: IndexType, fit: FitConfig | None) -> dict[str, Any]:
    """What the source's own plan says, with the new type, and which index it was made from."""
    plan = read_json(source.directory / index.PLAN)
    kept = {key: value for key, value in plan.items() if key not in ("format", "type", "calibration")}
    return {**kept, "type": stored, "converted": sha256_json(source.manifest["shards"]),
            **({"calibration": fit.plain()} if fit else {})}  # fmt: skip
