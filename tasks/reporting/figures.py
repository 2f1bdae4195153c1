"""The report's figures: drawn from the ledger by matplotlib, turned into inline SVG that follows the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from tasks.reporting.results import BASE, ORACLE, RANDOM, Column, Results, gather, measured
from tasks.selection.ledger import open_ledger, rows, scalar

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    from numpy.typing import NDArray

INK, QUIET, RULE = "#23262b", "#6d727a", "#d9d8d2"
POSITIVE, NEGATIVE = "#1f6f8b", "#c8672e"
ARMS = ("#1f5fa8", "#c4571a", "#2f7d4f", "#7a4fa3", "#9a7400", "#0f7c85", "#b03a6f", "#7b5a3c")
"""Colours of the arms in turn; the three reference arms are drawn in :data:`QUIET`."""
DASHES = {BASE: (0, (1, 2)), RANDOM: (0, (5, 2)), ORACLE: (0, (5, 1.5, 1, 1.5))}

THEMED = {INK: "ink", QUIET: "quiet", RULE: "rule", POSITIVE: "positive", NEGATIVE: "negative"} | {
    colour: f"arm-{place}" for place, colour in enumerate(ARMS)
}
"""Colour → the CSS variable that stands for it on the page."""

STYLE = {
    "font.family": "sans-serif", "font.size": 9, "text.color": INK,
    "text.parse_math": False,  # an arm may be called $x$
    "axes.edgecolor": QUIET, "axes.labelcolor": QUIET, "axes.linewidth": 0.7, "axes.axisbelow": True,
    "axes.titlesize": 9.5, "axes.titlecolor": INK, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6,
    "xtick.color": QUIET, "ytick.color": QUIET, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "svg.fonttype": "none",  # text stays text: it can be read out, searched and copied
}  # fmt: skip

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_WIDTH = 9.2  # inches; 72 SVG units each
_PANELS = 4  # score distributions in a row


def purity_png(ledger: Path) -> bytes:
    """The purity curves as a PNG, for an image artifact.

    Raises:
        InputError: there is no ledger to read.
    """
    with open_ledger(ledger) as con, axes_style("purity"):
        results = gather(con)
        buffer = io.BytesIO()
        _purity(con, results, _Pens(results)).savefig(
            buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None}
        )
        return buffer.getvalue()


def draw(con: duckdb.DuckDBPyConnection, results: Results) -> dict[str, str]:
    """The figures: name (outcome, scores, purity, loss) → SVG element, or nothing where the ledger has no rows for it.

    Equal ledgers give equal bytes. All text in them is escaped by the SVG writer.
    """
    pens = _Pens(results)
    figures: dict[str, str] = {}
    for name, table, title, paint in (
        ("outcome", "evaluations", "Purity and control perplexity of every arm, with intervals", _outcome),
        ("scores", "scores", "Distribution of the scores by label, one panel an arm", _scores),
        ("purity", "scores", "Purity against the share of the pool that is selected", _purity),
        ("loss", "training", "Training loss of every arm", _loss),
    ):
        with axes_style(name):
            there = scalar(con, f"SELECT count(*) FROM {table}") > 0
            figures[name] = as_svg(paint(con, results, pens), name, title) if there else ""
    return figures


class _Pens:
    """One colour and dash an arm, the same in every figure."""

    def __init__(self, results: Results) -> None:
        coloured = [arm.name for arm in measured(results) if arm.name not in DASHES]
        self._colours = {name: ARMS[place % len(ARMS)] for place, name in enumerate(coloured)}

    def colour(self, name: str) -> str:
        return self._colours.get(name, QUIET)

    def line(self, name: str) -> dict[str, Any]:
        return {"color": self.colour(name), "linestyle": DASHES.get(name, "-"), "linewidth": 1.6}


@contextmanager
def axes_style(salt: str) -> Iterator[None]:
    """Our style, with ids in the SVG that depend on ``salt`` and the contents alone."""
    import matplotlib

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        yield


def new_figure(height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no state left between figures

    return Figure((_WIDTH, height), layout="constrained")


def _outcome(_: duckdb.DuckDBPyConnection, results: Results, pens: _Pens) -> Any:
    """Purity and control perplexity side by side, an arm a line, the best purity on top."""
    columns = results.columns[:2]
    arms = sorted(measured(results), key=lambda arm: (_value(results.columns[0], arm) or 0.0, arm.name))
    figure = new_figure(0.9 + 0.27 * len(arms))
    for axes, column in zip(figure.subplots(1, 2, sharey=True), columns, strict=True):
        scale = 100 if column.percent else 1
        for place, arm in enumerate(arms):
            estimate = arm.estimates.get(column.key)
            if estimate is None:
                continue
            if estimate.low is not None and estimate.high is not None:
                axes.plot([scale * estimate.low, scale * estimate.high], [place, place],
                          color=pens.colour(arm.name), linewidth=2.2, alpha=0.45, solid_capstyle="round")  # fmt: skip
            axes.plot(scale * estimate.value, place, "o", color=pens.colour(arm.name), markersize=5.5)
        better = "more is better" if column.higher else "less is better"
        axes.set_title(f"{short_name(column.title)}{', %' if column.percent else ''}  ({better})")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    axes = figure.axes[0]
    axes.set_yticks(range(len(arms)), [short_name(arm.name) for arm in arms], color=INK)
    axes.set_ylim(-0.6, len(arms) - 0.4)
    if results.documents and results.positives:
        axes.axvline(100 * results.positives / results.documents, color=QUIET, linewidth=0.8, linestyle=(0, (2, 2)))
    return figure


def _value(column: Column, arm: Any) -> float | None:
    estimate = arm.estimates.get(column.key)
    return None if estimate is None else estimate.value


def _scores(con: duckdb.DuckDBPyConnection, results: Results, _: _Pens) -> Any:
    import numpy as np

    names = [arm.name for arm in measured(results)]
    statistics = "SELECT DISTINCT method, auroc FROM purity WHERE method IN (SELECT method FROM scores)"
    scored = {row["method"]: row["auroc"] for row in rows(con, statistics)}
    names = [name for name in names if name in scored]
    lines = -(-len(names) // _PANELS)
    figure = new_figure(0.35 + 1.55 * lines)
    panels = figure.subplots(lines, _PANELS, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        columns = con.execute(
            "SELECT score, coalesce(label = ?, false) AS positive FROM scores JOIN documents USING (doc_id) "
            "WHERE method = ? AND split = 'pool' ORDER BY rank",
            [results.positive, name],
        ).fetchnumpy()
        scores, positive = columns["score"], columns["positive"].astype(bool)
        low, high = np.quantile(scores, (0.005, 0.995))
        edges = np.linspace(low, high, 29) if low < high else np.array([low - 0.5, low + 0.5])
        for chosen, colour in ((~positive, NEGATIVE), (positive, POSITIVE)):
            if chosen.any():
                counts = np.histogram(np.clip(scores[chosen], edges[0], edges[-1]), edges)[0] / chosen.sum()
                axes.stairs(counts, edges, fill=True, color=colour, alpha=0.28)
                axes.stairs(counts, edges, color=colour, linewidth=1.2)
        cut = scalar(con, "SELECT max(rank) FROM selections WHERE method = ?", [name])
        if cut:
            axes.axvline(np.clip(scores[cut - 1], edges[0], edges[-1]), color=INK, linewidth=0.9)
        auroc = scored[name]
        axes.set_title(short_name(name) + ("" if auroc is None else f"  {auroc:.2f}"))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        axes.locator_params(axis="x", nbins=4)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    return figure


def _purity(con: duckdb.DuckDBPyConnection, results: Results, pens: _Pens) -> Any:
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    size, positives = results.documents, results.positives
    figure = new_figure(3.6)
    axes = figure.subplots()
    ends: dict[str, float] = {}
    shares = np.array([1.0, 100.0])
    for arm in measured(results):
        curve = rows(
            con, "SELECT k, purity FROM purity WHERE method = ? AND auprc IS NOT NULL ORDER BY k", [arm.name]
        )
        if curve:
            shares = np.array([100 * row["k"] / size for row in curve])
            values = [100 * row["purity"] for row in curve]
            axes.plot(shares, values, marker="o", markersize=3, **pens.line(arm.name))
            ends[arm.name] = values[-1]
    axes.plot(shares, [100 * min(1.0, positives / (share * size / 100)) for share in shares],
              color=QUIET, linewidth=0.9, linestyle=DASHES[ORACLE])  # fmt: skip
    ends["all labels known"] = 100 * min(1.0, positives / (shares[-1] * size / 100))
    if results.selected:
        axes.axvline(100 * results.selected / size, color=INK, linewidth=0.8)
    axes.set_xscale("log")
    places = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
    ticks = [place for place in places if shares[0] * 0.99 <= place <= shares[-1] * 1.01]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_ylim(0, 104)
    axes.set_xlabel("share of the pool that is selected")
    axes.set_ylabel("purity, %")
    _key(axes, sorted(ends, key=lambda name: (-ends[name], name)), pens)
    return figure


def _loss(con: duckdb.DuckDBPyConnection, results: Results, pens: _Pens) -> Any:
    import numpy as np

    figure = new_figure(3.4)
    axes = figure.subplots()
    ends: dict[str, float] = {}
    for arm in measured(results):
        columns = con.execute(
            "SELECT step, loss FROM training WHERE method = ? ORDER BY step", [arm.name]
        ).fetchnumpy()
        steps, losses = columns["step"], np.asarray(columns["loss"])
        if len(steps):
            smooth = _running_mean(losses, max(1, len(steps) // 15))
            axes.plot(steps, losses, color=pens.colour(arm.name), linewidth=0.6, alpha=0.22)
            axes.plot(steps, smooth, **pens.line(arm.name))
            ends[arm.name] = float(smooth[-1])
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss, nats a token")
    axes.margins(x=0.01)
    _key(axes, sorted(ends, key=lambda name: (-ends[name], name)), pens)
    return figure


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean of the last ``width`` values at every place, of fewer at the beginning."""
    import numpy as np

    sums = np.cumsum(np.append(0.0, values))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    means: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _key(axes: Any, names: Sequence[str], pens: _Pens) -> None:
    """The legend right of the axes, in the order in which the lines end."""
    from matplotlib.lines import Line2D

    dashes = {"all labels known": {**pens.line(ORACLE), "linewidth": 0.9}}
    handles = [Line2D([], [], **dashes.get(name, pens.line(name))) for name in names]
    # A label that begins with an underscore is left out by matplotlib; one behind a word joiner is not.
    labels = [f"\u2060{short_name(name)}" for name in names]
    axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=2.6)


def short_name(name: str) -> str:
    """A name fit for a figure: no control characters (they are not allowed in SVG), no more than 24 letters."""
    text = "".join(letter if letter.isprintable() else "?" for letter in name)
    return text if len(text) <= 24 else f"{text[:23]}…"


def as_svg(figure: Any, name: str, title: str) -> str:
    """The figure as an SVG element for a page: ids of its own, colours as CSS variables, sized by the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):  # a style element would reach the whole page
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{_XLINK}}}href":
                element.set(key, f"#{name}-{value[1:]}")
            else:
                element.set(key, _themed(value.replace("url(#", f"url(#{name}-")))
    del root.attrib["width"], root.attrib["height"]
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str) -> str:
    return re.sub(r"#[0-9a-f]{6}", lambda found: _variable(found.group()), style)


def _variable(colour: str) -> str:
    return f"var(--{THEMED[colour]})" if colour in THEMED else colour
