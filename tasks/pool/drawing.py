"""How many documents each source gives to each set, and which."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tasks.common.errors import InputError
from tasks.common.progress import Progress, Report
from tasks.pool.config import LengthBin, PoolConfig, SourceConfig, Split
from tasks.pool.duplicates import DuplicateIndex

SPLITS = ("queries", "heldout", "pool")
"""The sets that are drawn, in this order: of two duplicates the one drawn first stays."""

Range = tuple[float, float]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Candidate:
    """A document that may be drawn."""

    doc_id: str
    text: str
    words: int
    origin: int
    """Number of the source's text that the document is a piece of."""


@dataclass(frozen=True)
class Drawn:
    """A document that was drawn."""

    doc_id: str
    text: str
    label: str
    source: str


@dataclass
class Source:
    """A source, its candidates in the order in which they are drawn, and what became of its texts."""

    name: str
    config: SourceConfig
    candidates: list[Candidate]
    counts: dict[str, int] = field(default_factory=dict)


def draw(
    config: PoolConfig, sources: Sequence[Source], *, seed: int, progress: Report | None = None
) -> dict[str, list[Drawn]]:
    """Draw every set; set → documents by id.

    Candidates are passed over that repeat a drawn document, or are a piece of a text that another set has a piece
    of. The sources' counts are brought up to date.

    Raises:
        InputError: a source has fewer documents than are to be drawn from it.
    """
    index = DuplicateIndex(config.near_duplicate, seed)
    home: dict[tuple[str, int], str] = {}  # text → the set that has a piece of it
    drawn: dict[str, list[Drawn]] = {split: [] for split in SPLITS}
    plan = _plan(config)
    for source in sources:
        source.counts |= {"exact_duplicates": 0, "near_duplicates": 0}
    with Progress("drawing", sum(map(sum, (p.values() for p in plan.values()))), "documents", report=progress) as bar:
        for split in SPLITS:
            for source in sources:
                wanted = plan[split].get(source.name, 0)
                missing = {place: count for place, count in allot(wanted, _ranges(config.lengths)).items() if count}
                left = []
                for one in source.candidates:
                    place = next((place for place in missing if place[0] <= one.words <= place[1]), None)
                    if place is None or home.get((source.name, one.origin), split) != split:
                        left.append(one)
                    elif (kind := index.add(one.text)) is not None:
                        source.counts[f"{kind}_duplicates"] += 1
                    else:
                        missing[place] -= 1
                        if not missing[place]:
                            del missing[place]
                        home[source.name, one.origin] = split
                        drawn[split].append(Drawn(one.doc_id, one.text, source.config.label, source.name))
                        bar.add(1)
                _require_none(missing, source.name, split, wanted)
                source.counts[split] = wanted
                source.candidates = left
    return {split: sorted(documents, key=lambda one: one.doc_id) for split, documents in drawn.items()}


def allot(total: int, weights: Mapping[Key, float]) -> dict[Key, int]:
    """``total`` things shared out by weight in whole numbers, what is left over to the largest remainders (ties: to
    the first)."""
    exact = {key: total * weight / sum(weights.values()) for key, weight in weights.items()}
    given = {key: math.floor(share) for key, share in exact.items()}
    rest = total - sum(given.values())
    for key in sorted(exact, key=lambda key: given[key] - exact[key])[:rest]:
        given[key] += 1
    return given


def _plan(config: PoolConfig) -> dict[str, dict[str, int]]:
    """Set → source → number of documents."""
    control = round(config.size * config.control_share)
    others = [label for label in config.labels if label != config.control_label]
    heldout: dict[str, int] = {}
    for label, count in config.heldout.items():
        heldout |= allot(count, _weights(config, "heldout", [label]))
    return {
        "queries": allot(config.queries, _weights(config, "queries", [config.control_label])),
        "heldout": heldout,
        "pool": allot(control, _weights(config, "pool", [config.control_label]))
        | allot(config.size - control, _weights(config, "pool", others)),
    }


def _weights(config: PoolConfig, split: Split, labels: Sequence[str]) -> dict[str, float]:
    """The shares of the sources that give a set its documents of some labels, by label and then by name."""
    return {
        name: source.share
        for label in labels
        for name, source in sorted(config.sources.items())
        if source.label == label and split in source.splits
    }


def _ranges(lengths: Sequence[LengthBin]) -> dict[Range, float]:
    return {part.words: part.share for part in lengths} if lengths else {(0, math.inf): 1.0}


def _require_none(missing: Mapping[Range, int], name: str, split: str, wanted: int) -> None:
    for (fewest, most), count in missing.items():
        length = "" if most == math.inf else f" with {fewest} to {most} words"
        raise InputError(
            f"has {wanted - sum(missing.values())} of the {wanted} new documents for {split}; {count} more{length} are "
            "needed. Give it more text, a smaller share or other limits, or ask for fewer documents",
            field=f"pool.sources.{name}",
        )
