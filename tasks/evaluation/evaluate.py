"""One arm's evaluation: perplexity, ARC-Challenge, RULER-CWE, each kept as soon as it is whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.errors import InputError
from tasks.common.files import sha256_json, whole_file, write_json
from tasks.common.models import load_causal_lm, load_tokenizer, locate, torch_dtype
from tasks.common.progress import Report
from tasks.evaluation import intervals
from tasks.evaluation.harness import evaluate_arc, evaluate_cwe
from tasks.evaluation.intervals import Estimate
from tasks.evaluation.perplexity import token_perplexity
from tasks.evaluation.prepare import ARC_FILE, CWE_FILE

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.evaluation.config import EvaluationConfig

VERSION = 1
"""Raised when the same configuration and inputs give other numbers."""
METRICS_FILE = "metrics.parquet"
NOTES_FILE = "notes.json"
PERPLEXITY, ARC, CWE = "perplexity.parquet", "arc.parquet", "cwe.parquet"
COLUMNS = ("doc_id", "text", "label")
_CHECKSUM = "sha256"
"""Key of a part's metadata under which the checksum of its rows stands."""


def evaluate(
    config: EvaluationConfig,
    model_dir: Path,
    prepared: Path,
    heldout: Path,
    out: Path,
    *,
    report: Report | None = None,
) -> int:
    """Evaluate a model and write its metrics (the columns of Table 4) into ``out``.

    Written are a file a part with a row a document (``perplexity.parquet``, ``arc.parquet``, ``cwe.parquet``), from
    these ``metrics.parquet`` (metric, value, stderr, low, high, n; names ``perplexity_<label>``, ``arc_challenge_acc``,
    ``arc_challenge_acc_norm``, ``ruler_cwe``) and ``notes.json`` (what was cut, as ``{"metric", "note"}``). A part that
    stands in ``out`` already is not computed again.

    Args:
        config: what is measured.
        model_dir: directory of the model.
        prepared: directory that :func:`tasks.evaluation.prepare.prepare` wrote.
        heldout: Parquet with ``doc_id``, ``text`` and ``label``.
        out: directory to write to.
        report: told the share done.

    Returns:
        The number of metrics.

    Raises:
        InputError: the model or a file cannot be used, or a prompt does not fit the model's context.
    """
    @cache
    def loaded() -> tuple[Any, Any]:
        located = locate(str(model_dir))
        return load_causal_lm(located, dtype=torch_dtype(config.precision)), load_tokenizer(located)

    def perplexity(told: Report) -> pa.Table:
        return token_perplexity(
            *loaded(), _documents(heldout), max_length=config.max_length, batch_tokens=config.batch_tokens, report=told
        )

    def arc(told: Report) -> pa.Table:
        return evaluate_arc(*loaded(), _prepared(prepared / ARC_FILE), batch_size=config.batch_size, report=told)

    def cwe(told: Report) -> pa.Table:
        assert config.ruler_cwe is not None
        return evaluate_cwe(
            *loaded(), _prepared(prepared / CWE_FILE), batch_size=config.batch_size,
            truncate=config.ruler_cwe.truncate, report=told,
        )  # fmt: skip

    parts: dict[str, Callable[[Report], pa.Table]] = {PERPLEXITY: perplexity}
    if config.arc is not None:
        parts[ARC] = arc
    if config.ruler_cwe is not None:
        parts[CWE] = cwe

    tables: dict[str, pa.Table] = {}
    for i, (name, part) in enumerate(parts.items()):
        table = _kept(out / name)
        if table is None:
            table = part(_within(report, i, len(parts)))
            table = table.replace_schema_metadata({_CHECKSUM: _checksum(table)})
            _write(table, out / name)
        tables[name] = table
    estimates = _estimates(tables, config, heldout)
    _write(_metrics(estimates), out / METRICS_FILE)
    write_json(out / NOTES_FILE, _notes(tables))
    return len(estimates)


def _kept(path: Path) -> pa.Table | None:
    """A part that stands as it was written; None where it does not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        whole = (table.schema.metadata or {}).get(_CHECKSUM.encode()) == _checksum(table).encode()
    except (pa.ArrowException, OSError, ValueError):
        return None
    return table if whole else None


def _checksum(table: pa.Table) -> str:
    return sha256_json(table.to_pydict())


def _within(report: Report | None, part: int, parts: int) -> Report:
    """The share of one part, told as a share of all of them."""
    return lambda share: report((part + share) / parts) if report is not None else None


def _documents(heldout: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(heldout)
    except FileNotFoundError:
        raise InputError("no such file", file=heldout) from None
    except pa.ArrowInvalid as error:
        raise InputError(f"is not Parquet ({error})", file=heldout) from None
    for column in COLUMNS:
        if column not in table.column_names:
            raise InputError("held-out documents need this column", file=heldout, field=column)
    return table.select(list(COLUMNS))


def _prepared(path: Path) -> Path:
    if not path.exists():
        raise InputError("not prepared; make it with the configuration it is evaluated with", file=path)
    return path


def _write(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    with whole_file(path) as part:
        pq.write_table(table, part)


def _estimates(tables: dict[str, pa.Table], config: EvaluationConfig, heldout: Path) -> dict[str, Estimate]:
    """Metric name → estimate; perplexities by label, then ARC-Challenge, then RULER-CWE."""
    import pyarrow.compute as pc

    estimates: dict[str, Estimate] = {}
    documents = tables[PERPLEXITY]
    for label in sorted(set(documents["label"].to_pylist())):
        # A document of one token predicts nothing and says nothing.
        rows = documents.filter((pc.field("label") == label) & (pc.field("n_tokens") > 0))
        if rows.num_rows < 2:
            raise InputError(
                f"fewer than two documents of label {label!r} have two tokens or more; hold out more of them",
                file=heldout,
            )
        estimates[f"perplexity_{label}"] = intervals.perplexity(
            rows["nll"].to_numpy(), rows["n_tokens"].to_numpy(), config
        )
    for name, column, metric in (
        (ARC, "acc", "arc_challenge_acc"), (ARC, "acc_norm", "arc_challenge_acc_norm"), (CWE, "score", "ruler_cwe"),
    ):  # fmt: skip
        if name in tables:
            estimates[metric] = intervals.mean(tables[name][column].to_numpy(), config)
    return estimates


def _metrics(estimates: dict[str, Estimate]) -> pa.Table:
    import pyarrow as pa

    numbers = [(name, pa.float64()) for name in ("value", "stderr", "low", "high")]
    schema = pa.schema([("metric", pa.string()), *numbers, ("n", pa.int64())])
    return pa.Table.from_pylist([{"metric": name, **asdict(estimate)} for name, estimate in estimates.items()], schema)


def _notes(tables: dict[str, pa.Table]) -> list[dict[str, str]]:
    """What a reader of the metrics has to know: texts and prompts that were cut."""
    import pyarrow.compute as pc

    notes: list[dict[str, str]] = []
    long = tables[PERPLEXITY].filter(pc.field("n_cut") > 0)
    if long.num_rows:
        kept = long["n_tokens"][0].as_py() + 1
        notes.append(
            {
                "metric": "perplexity",
                "note": f"{long.num_rows} of {tables[PERPLEXITY].num_rows} held-out documents are longer than {kept} "
                f"tokens; only their first {kept} are looked at",
            }
        )
    if CWE in tables:
        cut = tables[CWE].filter(pc.field("kept_tokens") < pc.field("prompt_tokens"))
        if cut.num_rows:
            before = pc.min_max(cut["prompt_tokens"]).as_py()
            notes.append(
                {
                    "metric": "ruler_cwe",
                    "note": f"{cut.num_rows} of {tables[CWE].num_rows} prompts are longer than the model's context "
                    f"allows and were cut from the left, from {before['min']} to {before['max']} tokens down to "
                    f"{cut['kept_tokens'][0].as_py()}",
                }
            )
    return notes
