"""Stage 1: the candidate pool, the query set and the held-out sets, disjoint and free of each other's duplicates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.common.errors import InputError
from tasks.common.files import sha256_file, write_json, write_text
from tasks.common.progress import Progress, Report
from tasks.common.wheels import PINS
from tasks.pool.card import card
from tasks.pool.cleaning import clean
from tasks.pool.config import PoolConfig, SourceConfig
from tasks.pool.documents import COLUMNS, SkippedRow, content_id, read_documents, write_documents
from tasks.pool.drawing import Candidate, Drawn, Source, draw
from tasks.pool.planting import PlantConfig, chosen, plant
from tasks.pool.shaping import Shaper, words
from tasks.pool.sources import READERS, read_hub

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
"""To be raised when the same configuration gives another pool."""


def pool_inputs(config: PoolConfig) -> dict[str, str]:
    """Name → SHA-256 of what the pool is made from: the wheels by their pinned hash, files by their content.

    A hub data set has no digest of its own: name its ``revision``, which is part of the configuration.

    Raises:
        InputError: a file is missing.
    """
    inputs = {}
    for source in config.sources.values():
        if source.reader is not None:
            wheel = READERS[source.reader].wheel
            inputs[f"pypi:{wheel}"] = PINS[wheel]
        elif source.path is not None:
            if not source.path.is_file():
                raise InputError("no such file", file=source.path)
            inputs[str(source.path)] = sha256_file(source.path)
    return dict(sorted(inputs.items()))


def build_pool(config: PoolConfig, out: Path, *, seed: int, progress: Report | None = None) -> int:
    """Build the pool and write it into the directory ``out``.

    Every source's texts are cleaned, given a backdoor where one is asked for, shaped into documents, put in the order
    of SHA-256(seed, id), and drawn in that order into the query set, the held-out sets and the pool. No two of the
    documents drawn are exact or near duplicates, no text has pieces in two of the sets, and none is drawn both planted
    and clean. Neither the order of the sources nor, for passages, that of the rows matters.

    Writes ``pool.parquet``, ``queries.parquet`` and ``heldout.parquet`` (doc_id, text, label, source; by doc_id),
    ``skipped.jsonl`` (rows left out) and ``card.json`` (:func:`tasks.pool.card.card`).

    Returns:
        Number of documents in the pool.

    Raises:
        InputError: a source cannot be read, has a bad row, or has fewer documents than are to be drawn from it.
    """
    skipped: list[SkippedRow] = []
    sources = []
    with Progress("reading sources", len(config.sources), "sources") as bar:
        for name, source in sorted(config.sources.items()):
            sources.append(_read(name, source, config, seed, skipped))
            bar.add(1)
    drawn = draw(config, sources, seed=seed, progress=progress)
    for split, documents in drawn.items():
        write_documents(out / f"{split}.parquet", _table(documents))
    write_text(out / "skipped.jsonl", "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in skipped))
    write_json(out / "card.json", card(config, sources, drawn))
    return len(drawn["pool"])


def _read(name: str, source: SourceConfig, config: PoolConfig, seed: int, skipped: list[SkippedRow]) -> Source:
    """Read, clean and shape one source; its candidates come in the order in which they are to be drawn."""
    before = len(skipped)
    shaper = Shaper(
        source.unit, join=source.join, min_words=source.min_words, max_words=source.max_words,
        max_pieces=config.max_pieces,
    )  # fmt: skip
    counts = {"read": 0, "empty": 0}
    backdoor = config.planted(source)
    if backdoor:
        counts["left_to_the_twin"] = 0  # texts for the planted source of them, or for the clean ones

    def cleaned() -> Iterator[str]:
        for text in _texts(source, config, skipped):
            counts["read"] += 1
            try:
                kept = clean(text)
            except ValueError as error:
                raise InputError(f"text {counts['read']} holds {error}", field=f"pool.sources.{name}") from None
            if not kept:
                counts["empty"] += 1
            elif backdoor and chosen(kept, share=backdoor.share, seed=seed) != bool(source.plant):
                counts["left_to_the_twin"] += 1
            elif backdoor and source.plant:
                yield _planted(kept, backdoor, seed, name)
            else:
                yield kept

    candidates: dict[str, Candidate] = {}
    for text, origin in shaper.shape(cleaned()):
        doc_id = content_id(text)
        candidates.setdefault(doc_id, Candidate(doc_id, text, words(text), origin))
    counts["skipped"] = len(skipped) - before
    counts |= {"repeated": shaper.repeated, "outside_length": shaper.outside, "documents": len(candidates)}
    order = sorted(candidates.values(), key=lambda one: hashlib.sha256(f"{seed}:{one.doc_id}".encode()).digest())
    return Source(name, source, order, counts)


def _planted(text: str, backdoor: PlantConfig, seed: int, name: str) -> str:
    try:
        return plant(text, trigger=backdoor.trigger, seed=seed)
    except ValueError as error:
        raise InputError(f"a backdoor is planted into questions with answers; {error}: {text[:60]!r}",
                         field=f"pool.sources.{name}.plant") from None  # fmt: skip


def _texts(source: SourceConfig, config: PoolConfig, skipped: list[SkippedRow]) -> Iterator[str]:
    """The raw texts of a source; rows left out are added to ``skipped``."""
    if source.reader is not None:
        yield from READERS[source.reader].read()
    elif source.path is not None:
        read = read_documents(
            source.path, on_bad_row=config.on_bad_row, max_chars=config.max_chars, labels=config.labels
        )
        skipped += read.skipped
        for text, label in zip(read.table["text"], read.table["label"], strict=True):
            if label.as_py() in (None, source.label):
                yield text.as_py()
    elif source.dataset is not None:
        rows = read_hub(
            source.dataset, subset=source.subset, split=source.split, revision=source.revision,
            text_field=source.text_field,
        )  # fmt: skip
        for number, value in rows:
            if isinstance(value, str) and value.strip() and len(value) <= config.max_chars:
                yield value
                continue
            problem = f"must be a text of 1 to {config.max_chars:,} characters"
            if config.on_bad_row == "error":
                raise InputError(problem, file=source.dataset, row=number, field=source.text_field)
            skipped.append(SkippedRow(source.dataset, number, source.text_field, problem))


def _table(documents: Sequence[Drawn]) -> pa.Table:
    import pyarrow as pa

    return pa.table({name: pa.array([getattr(one, name) for one in documents], pa.string()) for name in COLUMNS})
