"""The report of a retrieval study: the form of Tables 2, 3 and 20–34, the choice of the default, wins and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.config import read_yaml
from tasks.common.errors import InputError
from tasks.common.files import read_json, write_json, write_text
from tasks.reporting.figures import INK, STYLE, as_svg, axes_style, new_figure, short_name
from tasks.reporting.report import jinja_environment
from tasks.reporting.results import NOTHING
from tasks.reporting.run import CONFIG, LEDGER, MANIFEST, REPORT, RESULTS, run_facts
from tasks.reporting.table import clean_name, text_table
from tasks.selection.choice import CHOOSING, Placed, RuleConfig
from tasks.selection.ledger import rows
from tasks.selection.study_ledger import TABLES, choice_of, mean_of, open_study

if TYPE_CHECKING:
    import duckdb

TEMPLATE, LOOK = "study.html.j2", "report.html.j2"
SHORTCUTS = ("random", "length", "perplexity")
"""Methods that look at no query: what they reach, the form of the text gives away."""
TITLES = {"pq_auprc": "auPRC", "purity": "purity"}
_METRICS = ("pq_auprc", "pq_low", "pq_high", "pq_auroc", "pq_auroc_low", "pq_auroc_high", "purity", "purity_low",
            "purity_high")  # fmt: skip
_COSTS = ("bytes_a_document", "build_seconds", "peak_mib", "query_seconds")
_PANELS = 4


@dataclass(frozen=True)
class Unified:
    """A cell of the paper's Tables 3 and 34: μ = (recall + predict)/2, δ = |recall − predict|/2, of auPRC."""

    mu: float
    delta: float | None
    """None where only one of the paradigms was run; μ is then its value."""

    def __str__(self) -> str:
        return f"{self.mu:.3f}" + ("" if self.delta is None else f" ±{self.delta:.3f}")


@dataclass(frozen=True)
class Study:
    """What the ledger holds, as the report shows it: means over the seeds of the hashes."""

    pools: list[dict[str, Any]]
    arms: list[str]
    kinds: dict[str, str]
    """Arm → method."""
    paradigms: list[str]
    figures: dict[tuple[str, str, str], dict[str, Any]]
    """(pool, paradigm, arm) → metrics, costs, ``seeds``, the range over them, ``at``: K → (auPRC, auROC), and
    ``reason``: what the arm had too little of to run, or None."""
    choice: list[dict[str, Any]]
    """Candidates in the order of the rule, each with ``ranks``: (pool, metric) → rank."""
    confidence: float

    def split(self, split: str) -> list[str]:
        """The pools of one split."""
        return [pool["pool"] for pool in self.pools if pool["split"] == split]

    def tasks(self, split: str) -> list[str]:
        """The tasks of one split."""
        return list(dict.fromkeys(pool["task"] for pool in self.pools if pool["split"] == split))

    def unified(self, split: str) -> dict[str, list[Unified | None]]:
        """Arm → a cell for every task of a split, and the mean over the tasks; None where a pool has no figure."""
        found: dict[str, list[Unified | None]] = {}
        for arm in self.arms:
            cells = [_mean([self._cell(pool["pool"], arm) for pool in self.pools
                            if (pool["split"], pool["task"]) == (split, task)]) for task in self.tasks(split)]
            found[arm] = [*cells, _mean(cells)]
        return found

    def why(self, split: str, arm: str, task: str | None = None) -> str:
        """What stands where a cell of :meth:`unified` is None: what the arm had too little of, if that is why."""
        reasons = (self.figures[pool["pool"], paradigm, arm]["reason"] for pool in self.pools
                   for paradigm in self.paradigms
                   if pool["split"] == split and task in (None, pool["task"]))  # fmt: skip
        return next(filter(None, reasons), NOTHING)

    def _cell(self, pool: str, arm: str) -> Unified | None:
        values = [self.figures[pool, paradigm, arm]["pq_auprc"] for paradigm in self.paradigms]
        if None in values:
            return None
        return Unified(sum(values) / len(values), abs(values[0] - values[1]) / 2 if len(values) == 2 else None)


def _mean(cells: Sequence[Unified | None]) -> Unified | None:
    known = [cell for cell in cells if cell is not None]
    if not known or len(known) < len(cells):
        return None
    deltas = [cell.delta for cell in known if cell.delta is not None]
    delta = sum(deltas) / len(deltas) if len(deltas) == len(known) else None
    return Unified(sum(cell.mu for cell in known) / len(known), delta)


def gather(con: duckdb.DuckDBPyConnection) -> Study:
    """Read the ledger of a study; arms and pools stand in the order of its configuration."""
    figures: dict[tuple[str, str, str], dict[str, Any]] = {}
    means = ", ".join(f"{mean_of(name)} AS {name}" for name in _METRICS)
    for row in rows(con, f"""
        SELECT pool, paradigm, method, count(*) AS seeds, {means}, min(pq_auprc) AS pq_least, max(pq_auprc) AS pq_most,
               min(purity) AS purity_least, max(purity) AS purity_most
        FROM rankings GROUP BY pool, paradigm, method
    """):  # fmt: skip
        figures[row["pool"], row["paradigm"], row["method"]] = {**row, "at": {}, "reason": None}
    costs = ", ".join(f"{mean_of(name)} AS {name}" for name in _COSTS)
    for row in rows(con, f"SELECT pool, paradigm, method, bool_or(shared) AS shared, {costs} FROM costs "
                         "GROUP BY pool, paradigm, method"):  # fmt: skip
        seconds = row["query_seconds"]
        figures[row["pool"], row["paradigm"], row["method"]] |= {
            **row, "query_ms": None if seconds is None else 1000 * seconds}  # fmt: skip
    for row in rows(con, f"SELECT pool, paradigm, method, k, {mean_of('auprc')} AS auprc, {mean_of('auroc')} AS auroc "
                         "FROM retrieval GROUP BY pool, paradigm, method, k ORDER BY k"):  # fmt: skip
        figures[row["pool"], row["paradigm"], row["method"]]["at"][row["k"]] = (row["auprc"], row["auroc"])
    for row in rows(con, "SELECT * FROM absent ORDER BY rowid"):
        where = row["pool"], row["paradigm"], row["method"]
        ks: dict[int, Any] = next((found["at"] for place, found in figures.items() if place[0] == row["pool"]), {})
        unknown = dict.fromkeys((*_METRICS, *_COSTS, "query_ms", "pq_least", "pq_most", "purity_least", "purity_most"))
        figures[where] = {**unknown, "method": row["method"], "seeds": 0, "shared": False, "reason": row["reason"],
                          "at": dict.fromkeys(ks, (None, None))}  # fmt: skip
    ranks = rows(con, "SELECT * FROM ranks")
    methods = rows(con, "SELECT method, kind FROM methods ORDER BY rowid")
    return Study(
        pools=rows(con, "SELECT * FROM pools ORDER BY rowid"),
        arms=[row["method"] for row in methods],
        kinds={row["method"]: row["kind"] for row in methods},
        paradigms=[name for (name,) in con.execute(
            "SELECT paradigm FROM rankings GROUP BY paradigm ORDER BY min(rowid)").fetchall()],
        figures=figures,
        choice=[{**row, "ranks": {(rank["pool"], rank["metric"]): rank["rank"] for rank in ranks
                                  if rank["arm"] == row["arm"]}}
                for row in rows(con, "SELECT * FROM choice ORDER BY rowid")],
        confidence=rows(con, "SELECT any_value(confidence) AS mass FROM rankings")[0]["mass"],
    )  # fmt: skip


@dataclass(frozen=True)
class Duel:
    """The default against another arm on one pool by one metric."""

    difference: float
    """The default's value less the other's."""
    clear: bool
    """Their intervals do not meet."""

    @property
    def outcome(self) -> str:
        """``win``, ``loss`` or ``tie`` of the default, to three decimals."""
        return "tie" if abs(self.difference) < 0.0005 else "win" if self.difference > 0 else "loss"


def duels(study: Study, default: str, paradigm: str) -> dict[str, dict[tuple[str, str], Duel | None]]:
    """Other arm → (pool, metric) → the default against it; None where one of the two has no figure."""
    found: dict[str, dict[tuple[str, str], Duel | None]] = {}
    for arm in study.arms:
        if arm == default:
            continue
        found[arm] = {}
        for pool in (row["pool"] for row in study.pools):
            ours, theirs = study.figures[pool, paradigm, default], study.figures[pool, paradigm, arm]
            for metric in CHOOSING:
                one, other = ours[metric], theirs[metric]
                found[arm][pool, metric] = None if one is None or other is None else Duel(
                    one - other, _apart(ours, theirs, "pq" if metric == "pq_auprc" else metric))  # fmt: skip
    return found


def _apart(one: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> bool:
    """Whether two intervals do not meet; an arm without one stands at a point of unknown width, so never."""
    bounds = [one[f"{metric}_low"], one[f"{metric}_high"], other[f"{metric}_low"], other[f"{metric}_high"]]
    return None not in bounds and (bounds[0] > bounds[3] or bounds[2] > bounds[1])


def report_study(directory: Path, *, out: Path | None = None) -> Path:
    """Write ``report.html`` of a finished study, and ``results.json`` where ``out`` is not given.

    Args:
        directory: the study.
        out: the HTML file; None is ``report.html`` in the study's directory.

    Raises:
        InputError: the directory holds no finished study.
    """
    if not (directory / MANIFEST).is_file():
        raise InputError("holds no finished study; `rise study` with the same --out finishes one", file=directory)
    import yaml

    config = read_yaml(directory / CONFIG)
    facts = run_facts(directory, config)
    facts["sources"] = {name: source for card in sorted((directory / "pool").glob("*/card.json"))
                        for name, source in read_json(card)["sources"].items()}  # fmt: skip
    environment = jinja_environment()
    environment.add_extension("jinja2.ext.loopcontrols")
    environment.filters |= {"bytes": lambda value: NOTHING if value is None else f"{value:,.0f}", "signed": _signed,
                            "milliseconds": _milliseconds, "size": _size, "took": _took}  # fmt: skip
    look = environment.loader.get_source(environment, LOOK)[0]
    with open_study(directory / LEDGER) as con:
        study = gather(con)
        default = config["default"] or next((row["arm"] for row in study.choice), None)
        statement = RuleConfig(**config["rule"]).statement if config["rule"] is not None else ""
        page = environment.get_template(TEMPLATE).render(
            style=look[look.index("<style>") + len("<style>") : look.index("</style>")],
            facts={**dict.fromkeys(("title", "date", "commit", "command", "hardware", "versions", "digests", "notes"),
                                   None), **facts},
            study=study, default=default, ruled=config["rule"] is not None, statement=statement, titles=TITLES,
            choosing=CHOOSING,
            shortcuts=[arm for arm in study.arms if study.kinds[arm] in SHORTCUTS],
            splits=[split for split in ("dev", "heldout") if study.split(split)],
            names={"dev": "Dev pools", "heldout": "Held-out pools", "predict": "predict (prospective)",
                   "recall": "recall (retrospective)"},
            best=_best, duels={paradigm: duels(study, default, paradigm) for paradigm in study.paradigms}
            if default else {}, figure=_outcome(study),
            rivals=_rivals(study, default) if default else [],
            stages=rows(con, "SELECT * EXCLUDE (path) FROM stages"),
            config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100),
        )  # fmt: skip
        results = {name: rows(con, f"SELECT * FROM {name} ORDER BY rowid") for name in TABLES if name != "stages"}
    write_text(out or directory / REPORT, page)
    if out is None:
        write_json(directory / RESULTS, {**results, "facts": facts})
    return out or directory / REPORT


def _best(values: Sequence[float | None], *, higher: bool = True) -> float | None:
    """The best of some values to three decimals, None where there is none to compare."""
    known = [round(value, 3) for value in values if value is not None]
    return (max if higher else min)(known) if len(known) > 1 else None


def _rivals(study: Study, default: str) -> list[dict[str, Any]]:
    """Every pool, paradigm and metric with the default's figure and the best other arm's."""
    found = []
    for pool in study.pools:
        for paradigm in study.paradigms:
            for metric in CHOOSING:
                others = [(study.figures[pool["pool"], paradigm, arm][metric], arm) for arm in study.arms
                          if arm != default]  # fmt: skip
                known = sorted((-value, arm) for value, arm in others if value is not None)
                bounds = "pq" if metric == "pq_auprc" else metric
                ours = study.figures[pool["pool"], paradigm, default]
                found.append({
                    "pool": pool["pool"], "split": pool["split"], "paradigm": paradigm, "metric": metric,
                    "value": ours[metric], "low": ours[f"{bounds}_low"], "high": ours[f"{bounds}_high"],
                    "rival": known[0][1] if known else None, "best": -known[0][0] if known else None,
                })  # fmt: skip
    return found


def _signed(value: float) -> str:
    return "0" if abs(value) < 0.0005 else f"{value:+.3f}".replace("-", "−").replace("0.", ".", 1)


def _milliseconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} ms"


def _size(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f} MiB" if value < 10_000 else f"{value / 1024:,.1f} GiB"


def _took(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f} s" if value < 100 else f"{value / 60:.1f} min"


def _outcome(study: Study) -> str:
    """auPRC and purity of every arm, a panel a pool, as an SVG element."""
    pools, paradigm = study.pools, study.paradigms[0]
    lines = -(-len(pools) // _PANELS)
    with axes_style("study"):
        figure = new_figure(lines * (0.75 + 0.2 * len(study.arms)))
        panels = figure.subplots(lines, min(len(pools), _PANELS), squeeze=False, sharey=True).ravel()
        for axes, pool in zip(panels, pools, strict=False):
            for place, arm in enumerate(reversed(study.arms)):
                found = study.figures[pool["pool"], paradigm, arm]
                for offset, metric, bounds, colour in ((0.14, "pq_auprc", "pq", "#1f5fa8"),
                                                       (-0.14, "purity", "purity", "#c4571a")):  # fmt: skip
                    if found[f"{bounds}_low"] is not None:
                        axes.plot([found[f"{bounds}_low"], found[f"{bounds}_high"]], [place + offset] * 2,
                                  color=colour, linewidth=1.8, alpha=0.4, solid_capstyle="round")  # fmt: skip
                    if found[metric] is not None:
                        axes.plot(found[metric], place + offset, "o", color=colour, markersize=3.8)
            axes.axvline(pool["positives"] / pool["documents"], color=STYLE["axes.labelcolor"], linewidth=0.8,
                         linestyle=(0, (2, 2)))  # fmt: skip
            axes.set_xlim(-0.02, 1.02)
            axes.set_title(f"{short_name(pool['pool'])}  ({'dev' if pool['split'] == 'dev' else 'held out'})")
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        for axes in panels[len(pools) :]:
            axes.set_visible(False)
        panels[0].set_yticks(range(len(study.arms)), [short_name(arm) for arm in reversed(study.arms)], color=INK)
        panels[0].set_ylim(-0.6, len(study.arms) - 0.4)
        return as_svg(figure, "study", "auPRC and purity of every arm on every pool, with intervals")


def study_table(ledger: Path) -> str:
    """The unified table of every split as plain text (Tables 3 and 34).

    Raises:
        InputError: there is no ledger to read.
    """
    with open_study(ledger) as con:
        study = gather(con)
    lines = []
    for split, title in (("dev", "dev pools"), ("heldout", "held-out pools")):
        if not study.split(split):
            continue
        head = ["method", *(clean_name(task, 20) for task in study.tasks(split)), "Overall"]
        places = [*study.tasks(split), None]
        body = [[clean_name(arm, 24), *(str(cell or study.why(split, arm, task)) for cell, task in
                                        zip(cells, places, strict=True))]
                for arm, cells in study.unified(split).items()]  # fmt: skip
        lines += [f"auPRC on the {title}, {_what(study.paradigms)}", *text_table(head, body), ""]
    return "\n".join(lines).rstrip()


def _what(paradigms: Sequence[str]) -> str:
    return "μ ± δ over recall and predict" if len(paradigms) == 2 else f"{paradigms[0]} alone"


def choice_table(ledger: Path, rule: RuleConfig) -> str:
    """The rule applied to the rows of a ledger, as plain text; computed anew, whatever the ledger says was chosen.

    Raises:
        InputError: there is no ledger, or the rule cannot be applied to it.
    """
    with open_study(ledger) as con:
        placed = choice_of(con, rule)
    places = list(placed[0].ranks)
    head = ["arm", "worst", "mean", "behind", "bytes",
            *(f"{clean_name(pool, 16)} {TITLES[metric]}" for pool, metric in places)]  # fmt: skip
    body = [_placed(one, places) for one in placed]
    return "\n".join([rule.statement, "", *text_table(head, body), "", f"chosen: {placed[0].arm}"])


def _placed(one: Placed, places: Sequence[tuple[str, str]]) -> list[str]:
    size = NOTHING if one.bytes_a_document is None else f"{one.bytes_a_document:,.0f}"
    return [clean_name(one.arm, 24), f"{one.worst:g}", f"{one.mean:.2f}", f"{one.shortfall:.3f}", size,
            *(f"{one.ranks[place]:g}" for place in places)]  # fmt: skip
