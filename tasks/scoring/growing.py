"""The indexes of a pool that grows, one for each model and sketch, each run's documents appended to it once.

``DIR/indexes/KEY`` is the index; ``KEY.json`` beside it says what it was begun from. A calibration that is fitted on a
few documents says little of those that come later. Until there are enough of them the index is ``KEY.early``: float32
signatures, which every run calibrates on all of them. ``DIR/tokens/KEY/NNNN.parquet`` has the lengths of a run's
documents in the scorer's tokens, not cut at ``max_length``; ``DIR/queries/KEY/DIGEST`` is the index of a query set.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from tasks.common.config import Config
from tasks.common.errors import InputError
from tasks.common.files import canonical_json, intact, read_json, sha256_json, whole_file, write_json
from tasks.common.models import locate, torch_dtype
from tasks.common.progress import Report
from tasks.common.stage import whole
from tasks.pool.documents import content_id, read_documents, write_documents
from tasks.pool.intake import DOCUMENTS, KEPT, read_texts
from tasks.scoring import index
from tasks.scoring.build import APPEND, VERSION, append_index, build_index, query_index
from tasks.scoring.config import (
    FitConfig,
    IndexType,
    RiseConfig,
    ScorerConfig,
    SketchConfig,
    check_type,
    from_recipe,
)
from tasks.scoring.convert import convert_index
from tasks.scoring.index import Index
from tasks.scoring.search import score

if TYPE_CHECKING:
    import pyarrow as pa

UNCUT = 1 << 30
"""Tokens that no document has: the ``max_length`` of lengths that are not cut."""


class SignatureConfig(Config):
    """What is kept of a document, and how it is compared.

    ``recipe: compact`` (or another of :data:`tasks.scoring.config.RECIPES`) stands for the fields that are not given.
    """

    sketch: SketchConfig = SketchConfig()
    """Algorithm 2's parameters."""
    stored: IndexType = "bit"
    """Type of the stored signatures; bit is the smallest."""
    fit: FitConfig | None = FitConfig()
    """Calibration, fitted once and kept from then on; None for none."""
    enough: int = Field(1000, ge=1)
    """Documents from which on it is: with fewer, signatures are kept as float32 and calibrated by each run anew."""

    @model_validator(mode="before")
    @classmethod
    def _of_recipe(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "recipe" not in values:
            return values
        own = from_recipe({name: values[name] for name in ("recipe", "sketch") if name in values})
        rise = RiseConfig.model_validate({name: value for name, value in own.items() if name != "sketch"})
        given = {name: value for name, value in values.items() if name != "recipe"}
        fit = None if rise.calibration == "none" else {"name": rise.calibration}
        if isinstance(given.get("fit"), dict):
            given["fit"] = {**(fit or {}), **given["fit"]}
        return {"stored": rise.index_type, "fit": fit, **given, "sketch": own.get("sketch", {})}

    @model_validator(mode="after")
    def _go_together(self) -> SignatureConfig:
        check_type(self.stored, self.fit.name if self.fit else "none")
        return self


@dataclass(frozen=True)
class Place:
    """Where the index of a model and a sketch stands."""

    root: Path
    """Directory of the curation."""
    key: str
    """Name of the index: equal where every signature is."""

    @property
    def index(self) -> Path:
        """The index whose calibration is kept."""
        return self.root / "indexes" / self.key

    @property
    def early(self) -> Path:
        """The index of floats that stands for it while there are few documents."""
        return self.root / "indexes" / f"{self.key}.early"

    @property
    def searched(self) -> Path:
        """The one of them that is searched."""
        return self.index if (self.index / index.MANIFEST).exists() else self.early

    def name(self, documents: int) -> str:
        """What scores of so many documents come from: equal for two runs whose scores are on one scale."""
        return self.key if self.searched == self.index else f"{self.key}-{documents}"

    def has(self, name: str) -> bool:
        """Whether scores with this :meth:`name` came from here."""
        return name.partition("-")[0] == self.key

    @property
    def begun(self) -> Path:
        """JSON of what the index was begun from: runs and the scorer's plan of shards."""
        return self.root / "indexes" / f"{self.key}.json"

    def tokens(self, run: int) -> Path:
        """Lengths of one run's documents."""
        return self.root / "tokens" / self.key / f"{run:04d}.parquet"

    def queries(self, digest: str) -> Path:
        """Index of a query set."""
        return self.root / "queries" / self.key / digest[:16]


def place_of(root: Path, scorer: ScorerConfig, signature: SignatureConfig) -> Place:
    """The place of a model and a sketch: another where any signature would be another one."""
    located = locate(scorer.model, revision=scorer.revision)
    return Place(root, sha256_json({
        "version": VERSION, "model": located.digest, "precision": str(torch_dtype(scorer.precision)),
        "max_length": scorer.max_length,
        **{name: value for name, value in signature.plain().items() if name != "enough"},
    })[:16])  # fmt: skip


def grow(
    place: Place, scorer: ScorerConfig, signature: SignatureConfig, intakes: Sequence[Path], documents: int, *,
    report: Report | None = None,
) -> dict[str, int]:  # fmt: skip
    """Bring an index up to the documents of all runs, or go on with that; what it holds is not scored again.

    An index is begun with the documents of all runs so far; then every run's documents are one append, so that an
    append that was killed is finished before the next. Only the intakes of runs that the index lacks are read.

    Args:
        place: where the index stands.
        scorer: the model.
        signature: what is kept of a document.
        intakes: the runs' intakes from the first on, at least one of them with a document.
        documents: how many all of them have.
        report: told the share done.

    Returns:
        ``documents`` and ``tokens`` (as the scorer read them) of the index.

    Raises:
        InputError: the index holds other documents, or an intake is damaged.
    """
    if not place.begun.exists():
        write_json(place.begun, {"runs": len(intakes), "model": scorer.model, "revision": scorer.revision,
                                 "batch_tokens": scorer.batch_tokens, "shard_tokens": scorer.shard_tokens,
                                 "signature": signature.plain()}, checked=True)  # fmt: skip
    begun = read_json(place.begun)
    # The plan of an unfinished build or append must not move under it.
    planned = scorer.model_copy(update={name: begun[name] for name in ("batch_tokens", "shard_tokens")})
    first, fit = begun["runs"], signature.fit
    if place.searched == place.early and fit is not None and (place.early.exists() or documents < signature.enough):
        _bring_up(place.early, planned, _as_floats(signature), intakes, first, documents, report)
        if documents >= signature.enough:
            _keep_calibration(place, signature, fit)
    else:
        _bring_up(place.index, planned, signature, intakes, first, documents, report)
    if place.searched == place.index:
        if "fitted_on" not in begun:
            write_json(place.begun, {**begun, "fitted_on": documents}, checked=True)
        shutil.rmtree(place.early, ignore_errors=True)
    for run, intake in enumerate(intakes, 1):
        if not place.tokens(run).exists():
            _lengths(place, scorer, run, intake)
    made = Index(place.searched).manifest["batches"]
    return {name: sum(batch[name] for batch in made) for name in ("documents", "tokens")}


def _bring_up(
    out: Path, scorer: ScorerConfig, signature: SignatureConfig, intakes: Sequence[Path], first: int, documents: int,
    report: Report | None,
) -> None:  # fmt: skip
    """Build an index of the ``first`` runs' documents, or go on with it, and append what it lacks of the others."""
    if not (out / index.MANIFEST).exists():
        for intake in intakes[:first]:
            whole(intake)
        together = intakes[0] / DOCUMENTS
        if first > 1:
            together = out.with_suffix(".documents.parquet")
            _join(intakes[:first], together)
        build_index(together, out, scorer, signature.sketch, stored=signature.stored, fit=signature.fit,
                    label="scoring", report=report)  # fmt: skip
    out.with_suffix(".documents.parquet").unlink(missing_ok=True)
    for run in _lacking(out, intakes, first, documents):
        append_index(intakes[run - 1] / DOCUMENTS, out, scorer, new=True, label="scoring", report=report)
    (out / APPEND).unlink(missing_ok=True)  # of an append that was killed when the index was whole


def _keep_calibration(place: Place, signature: SignatureConfig, fit: FitConfig) -> None:
    """Make the index from the one of floats: seconds, so what a killed call left is thrown away."""
    half = place.index.with_suffix(".half")
    for left in (half, place.index):
        shutil.rmtree(left, ignore_errors=True)
    convert_index(Index(place.early), half, stored=signature.stored, fit=fit)
    os.replace(half, place.index)


def _as_floats(signature: SignatureConfig) -> SignatureConfig:
    """The same signatures as float32, not calibrated."""
    return signature.model_copy(update={"stored": "fp32", "fit": None})


def _lacking(out: Path, intakes: Sequence[Path], first: int, documents: int) -> list[int]:
    """The runs after the ``first`` whose documents an index lacks, in order; the index has whole runs.

    Raises:
        InputError: it has neither all documents nor all but those of some last runs.
    """
    held = len(Index(out))
    left, runs = documents - held, list[int]()
    for run in range(len(intakes), first, -1):
        if left <= 0:
            break
        if rows := whole(intakes[run - 1]).rows:
            left -= rows
            runs.append(run)
    if left:
        raise InputError(f"holds {held} documents, and the runs took in {documents}; restore it from a copy, or remove "
                         "it to score them again", file=out)  # fmt: skip
    return runs[::-1]


def _join(intakes: Sequence[Path], out: Path) -> None:
    import pyarrow as pa

    _write(out, pa.concat_tables(read_texts(intakes, KEPT)))


def _write(path: Path, table: pa.Table, *, noted: bool = False) -> None:
    import pyarrow.parquet as pq

    with whole_file(path, noted=noted) as part:
        pq.write_table(table, part, compression="zstd")


def _lengths(place: Place, scorer: ScorerConfig, run: int, intake: Path) -> dict[str, int]:
    """Document → its length in tokens, of the documents of a run; counted once."""
    import pyarrow.parquet as pq

    from tasks.scoring.methods import token_counts

    if not intact(place.tokens(run)):
        whole(intake)
        uncut = scorer.model_copy(update={"max_length": UNCUT})
        _write(place.tokens(run), token_counts(uncut, intake / DOCUMENTS), noted=True)
    counted = pq.read_table(place.tokens(run))
    return dict(zip(counted["doc_id"].to_pylist(), counted["n_tokens"].to_pylist(), strict=True))


@dataclass(frozen=True)
class QuerySet:
    """The documents that say what is wanted."""

    table: pa.Table
    """doc_id, text, label, source."""
    digest: str
    """SHA-256 over ids and texts, by id."""


def read_queries(path: Path) -> QuerySet:
    """Read a query set.

    Raises:
        InputError: as :func:`read_documents`.
    """
    table = read_documents(path).table.sort_by("doc_id")
    pairs = zip(table["doc_id"].to_pylist(), table["text"].to_pylist(), strict=True)
    return QuerySet(table, content_id(canonical_json([[doc_id, text] for doc_id, text in pairs])))


SCORED = (("doc_id", "string"), ("score", "double"), ("n_tokens", "int32"), ("query", "string"))
"""Columns of :func:`search_for`, and their types."""


def search_for(
    place: Place, scorer: ScorerConfig, signature: SignatureConfig, queries: QuerySet, intakes: Sequence[Path], *,
    last: bool,
) -> pa.Table:  # fmt: skip
    """What a query set says of the documents of an index, whose own signatures are made once.

    Args:
        place: where the index stands.
        scorer: the model.
        signature: how documents are compared, where the index does not keep a calibration yet.
        queries: what is wanted.
        intakes: the runs' intakes from the first on, all in the index.
        last: score the documents of the last of them alone, by the calibration that the index keeps.

    Returns:
        ``doc_id``, ``score`` (mean over the queries), ``n_tokens`` (whole document), ``query`` (the one that the
        document matches best; of equal ones the smallest id), by id.

    Raises:
        InputError: no query has two tokens, or the model gives scores that are no numbers.
    """
    import numpy as np
    import pyarrow as pa

    runs = range(len(intakes) if last else 1, len(intakes) + 1)
    length: dict[str, int] = {}
    for run in runs:
        length |= _lengths(place, scorer, run, intakes[run - 1])
    schema = pa.schema(list(SCORED))
    if not length:
        return schema.empty_table()
    made, asked = Index(place.searched), _asked(place, scorer, queries)
    found = score(made, asked, calibrated=signature.fit.name if signature.fit else "none",
                  first=len(made) - len(length))  # fmt: skip
    assert found.per_query is not None  # RISE looks at the queries
    if not np.isfinite(found.mean).all():
        raise InputError("gives scores that are no numbers; check the model", file=scorer.model)
    order = np.argsort(np.array(found.query_ids, dtype=object), kind="stable")
    best_N = order[found.per_query[order].argmax(axis=0)]
    return pa.table({
        "doc_id": found.doc_ids, "score": found.mean + 0.0,  # turns -0.0 into 0.0
        "n_tokens": [length[doc_id] for doc_id in found.doc_ids],
        "query": [found.query_ids[query] for query in best_N],
    }, schema=schema).sort_by("doc_id")  # fmt: skip


def _asked(place: Place, scorer: ScorerConfig, queries: QuerySet) -> Index:
    """The index of a query set, made where it is not whole."""
    from tasks.scoring.calibration import empty

    out = place.queries(queries.digest)
    documents = out.with_suffix(".documents.parquet")
    if not _sound(out):
        shutil.rmtree(out, ignore_errors=True)  # an unfinished one may be of another plan of shards; seconds
        write_documents(documents, queries.table)
        query_index(Index(place.searched), documents, out, model=None if scorer.revision else scorer.model)
    documents.unlink(missing_ok=True)
    asked = Index(out)
    if all(bool(empty(block).all()) for block in asked.blocks()):
        raise InputError("every query is a single token, so nothing in it is predicted; give more text",
                         field="queries")  # fmt: skip
    return asked


def _sound(directory: Path) -> bool:
    """Whether an index is whole and as it was written."""
    try:
        index.verify(directory)
    except InputError:
        return False
    return True
