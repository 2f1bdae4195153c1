"""``report.html``: one self-contained page about a study, made from its ledger; and ``results.json`` beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from tasks.common.files import write_json, write_text
from tasks.reporting.figures import draw
from tasks.reporting.paper import SOURCE
from tasks.reporting.results import BASE, NOTHING, ORACLE, RANDOM, Results, gather, plain, signed_percent
from tasks.selection.ledger import open_ledger, rows

if TYPE_CHECKING:
    import duckdb

VERSION = 1
"""Raise when the same ledger and facts give another report: part of every cache key."""
TEMPLATE = "report.html.j2"
EXCERPTS, EXCERPT_LENGTH = 3, 420
"""Documents shown of every kind, and letters of each."""


class Facts(TypedDict, total=False):
    """What the ledger does not know about a run. Everything may be missing; what is missing is not shown."""

    title: str
    date: str
    command: str
    commit: str
    hardware: Mapping[str, Any]
    """Name → value: processor, cores, memory, accelerator."""
    versions: Mapping[str, str]
    """Package → version."""
    digests: Mapping[str, str]
    """What → digest: models, wheels, pool, ledger."""
    sources: Mapping[str, Mapping[str, Any]]
    """Source → provenance (``from``, ``what``, ``licence``): the pool's ``card.json["sources"]``."""
    notes: Sequence[str]
    """What a reader of the figures has to know: prompts that were cut, documents that were skipped."""


def write_report(
    ledger: Path,
    config: Mapping[str, Any],
    facts: Facts,
    out: Path,
    *,
    results_out: Path | None = None,
    excerpts: bool = False,
) -> None:
    """Write the report of a study. The same ledger, configuration and facts give the same bytes, but for seconds.

    Args:
        ledger: ``study.duckdb``.
        config: the resolved configuration, JSON types.
        facts: the run's circumstances.
        out: the HTML file.
        results_out: where to write the results and the facts as JSON.
        excerpts: show a few documents of the pool an arm; leave it off where the text may not be handed on.

    Raises:
        InputError: there is no ledger to read.
    """
    import yaml

    with open_ledger(ledger) as con:
        results = gather(con)
        page = jinja_environment().get_template(TEMPLATE).render(
            facts={**dict.fromkeys(Facts.__annotations__), **facts},
            results=results,
            paper=SOURCE,
            arms_of_the_run=[arm for arm in results.arms if arm.estimates],
            ends={"base": BASE, "random": RANDOM, "oracle": ORACLE},
            summary=_summary(results),
            ranking=_ranking(con),
            shortcuts=rows(con, "SELECT * FROM shortcuts ORDER BY purity DESC, shortcut"),
            documents=_documents(con),
            lengths=_lengths(con),
            stages=rows(con, "SELECT * EXCLUDE (path) FROM stages"),
            figures=draw(con, results),
            excerpts=_excerpts(con, results) if excerpts else {},
            config=yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100),
        )
        found = plain(results) | {"ranking": rows(con, "SELECT * FROM purity"), "facts": dict(facts)}
    write_text(out, page)
    if results_out is not None:
        write_json(results_out, found)


def jinja_environment() -> Any:
    """Templates with every value escaped; figures alone are marked safe, and their text was escaped when drawn."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda value: NOTHING if value is None else f"{100 * value:.1f}"
    environment.filters["fixed"] = lambda value: NOTHING if value is None else f"{value:.3f}"
    environment.filters["signed_percent"] = signed_percent
    environment.filters["count"] = lambda value: NOTHING if value is None else f"{value:,.0f}"
    environment.filters["seconds"] = _seconds
    return environment


def _seconds(value: float) -> str:
    minutes, seconds = divmod(round(value), 60)
    return f"{value:.1f} s" if value < 60 else f"{minutes} min {seconds:02} s"


def _summary(results: Results) -> dict[str, Any]:
    """The best arm of the first two columns and of the gain, among those that chose without labels."""
    free = [arm for arm in results.arms if arm.estimates and arm.name not in (BASE, ORACLE, RANDOM)]
    by_purity = sorted(
        (arm for arm in free if "purity" in arm.estimates),
        key=lambda arm: (-arm.estimates["purity"].value, arm.name),
    )
    by_gain = sorted(
        ((arm.gain, arm.name) for arm in free if arm.gain is not None), key=lambda pair: (-pair[0], pair[1])
    )
    return {"purity": by_purity[:1], "gain": by_gain[:1]}


def _ranking(con: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """The statistics of every arm at its own cut."""
    return rows(con, """
        SELECT purity.* FROM purity JOIN (SELECT method, max(rank) AS k FROM selections GROUP BY method)
        USING (method, k) ORDER BY auroc IS NULL, auprc DESC, method
    """)  # fmt: skip


def _documents(con: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """Documents a source and label, by split."""
    return rows(con, """
        SELECT source, label, count(*) FILTER (split = 'pool') AS pool, count(*) FILTER (split = 'queries') AS queries,
               count(*) FILTER (split NOT IN ('pool', 'queries')) AS heldout
        FROM documents GROUP BY source, label ORDER BY label NULLS LAST, pool DESC, source
    """)  # fmt: skip


def _lengths(con: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """Lengths in characters and tokens of the pool's documents by label, and how many hold a URL."""
    return rows(con, r"""
        SELECT label, count(*) AS documents,
               quantile_disc(length(text), [0.1, 0.5, 0.9]) AS characters,
               quantile_disc(n_tokens, [0.1, 0.5, 0.9]) AS tokens,
               avg(CAST(regexp_matches(text, '(https?://|www\.)') AS INTEGER)) AS urls
        FROM documents WHERE split = 'pool' GROUP BY label ORDER BY label NULLS LAST
    """)  # fmt: skip


def _excerpts(con: duckdb.DuckDBPyConnection, results: Results) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """An arm → the highest-ranked documents it should not have selected, and the lowest-ranked it missed."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for arm in results.arms:
        ranked = """
            SELECT scores.rank, label, source, left(text, $length) AS text, length(text) > $length AS cut
            FROM scores JOIN documents USING (doc_id) LEFT JOIN selections USING (method, doc_id)
            WHERE method = $method AND split = 'pool'
        """
        parameters = {"method": arm.name, "positive": results.positive, "length": EXCERPT_LENGTH, "many": EXCERPTS}
        kinds = {
            "wrong": "AND label <> $positive AND selections.rank IS NOT NULL ORDER BY scores.rank LIMIT $many",
            "missed": "AND label = $positive AND selections.rank IS NULL ORDER BY scores.rank DESC LIMIT $many",
        }
        shown = {kind: rows(con, f"{ranked} {which}", parameters) for kind, which in kinds.items()}
        if any(shown.values()):
            found[arm.name] = shown
    return found
