"""The picture of a curation over its runs: scores of what was new, where it came from, what was chosen, purity."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.reporting.figures import ARMS, INK, POSITIVE, QUIET, axes_style, new_figure, short_name

PICTURED = ("Scores of a run's new documents: the middle half thick, 5 to 95 % thin, a dot at the median; the line is "
            "the lowest score selected now.")  # fmt: skip
"""What the picture does not say itself."""
_SOURCES = len(ARMS) - 1
"""Sources with a colour of their own; the rest are drawn together."""


def runs_png(results: Sequence[Mapping[str, Any]]) -> bytes:
    """Runs of a curation side by side, as a PNG for the UI.

    Scores are shown of the runs that ask the same queries of the same index as the last: others cannot be compared.

    Args:
        results: ``result.json`` of the runs, in order; at least one.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    labelled = any(result["labels"] and result["positive"] is not None for result in results)
    sources = _sources(results)
    with axes_style("runs"):
        figure = new_figure(2.6)
        panels = figure.subplots(1, 3 + labelled)
        _scores(panels[0], results)
        for axes, what, title in ((panels[1], "new", "new documents, by source"),
                                  (panels[2], "selected", "the selection, by source")):  # fmt: skip
            _shares(axes, results, what, sources)
            axes.set_title(title)
        if labelled:
            _purity(panels[3], results)
        for axes in panels:
            axes.set_xlim(results[0]["run"] - 0.6, results[-1]["run"] + 0.6)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            axes.set_xlabel("run")
        for axes in panels[1:]:
            axes.set_ylim(0, 1.04)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
        handles, names = panels[1].get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False, fontsize=8,
                      handlelength=1.0)  # fmt: skip
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def _sources(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Source → colour, those with the most documents first."""
    seen = Counter({source: row["seen"] for source, row in results[-1]["sources"].items()})
    first = sorted(seen, key=lambda source: (-seen[source], source))[:_SOURCES]
    return dict(zip(first, ARMS, strict=False))


def _scores(axes: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """5 %, 25 %, 50 %, 75 % and 95 % of the scores of each run's new documents."""
    asked = [results[-1]["basis"][name] for name in ("index", "queries")]
    for result in results:
        drift = result["drift"]
        if [result["basis"][name] for name in ("index", "queries")] == asked and "score new q50" in drift:
            for low, high, width in (("05", "95", 1.2), ("25", "75", 4.0)):
                axes.plot([result["run"]] * 2, [drift[f"score new q{low}"], drift[f"score new q{high}"]],
                          color=POSITIVE, linewidth=width, alpha=0.55, solid_capstyle="butt")  # fmt: skip
            axes.plot(result["run"], drift["score new q50"], "o", color=POSITIVE, markersize=3.5)
    if (least := results[-1]["scores"].get("q00")) is not None:
        axes.axhline(least, color=INK, linewidth=0.9)
    axes.set_title("scores of new documents")


def _shares(axes: Any, results: Sequence[Mapping[str, Any]], what: str, sources: Mapping[str, str]) -> None:
    """Shares of the sources, stacked; those of no colour together."""
    prefix = f"share of {what}: "
    shares = [{name.removeprefix(prefix): value for name, value in result["drift"].items() if name.startswith(prefix)}
              for result in results]  # fmt: skip
    # A label that begins with an underscore is left out by matplotlib; one behind a word joiner is not.
    layers = [(f"\u2060{short_name(source)}", colour, [share.get(source, 0.0) for share in shares])
              for source, colour in sources.items()]  # fmt: skip
    others = [sum(value for source, value in share.items() if source not in sources) for share in shares]
    layers += [("others", QUIET, others)] if any(others) else []
    floor = [0.0] * len(results)
    for label, colour, heights in layers:
        axes.bar([result["run"] for result in results], heights, bottom=floor, color=colour, width=0.8, label=label)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axes.grid(axis="x", visible=False)


def _purity(axes: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """Share of good documents in the selection, and in all that were seen."""
    known = [result for result in results if result["positive"] in result["labels"]]
    runs = [result["run"] for result in known]
    rows = [result["labels"][result["positive"]] for result in known]
    axes.plot(runs, [row["selected"] for row in rows], marker="o", markersize=3.5, color=POSITIVE, linewidth=1.6)
    axes.plot(runs, [row["pool"] for row in rows], color=QUIET, linewidth=1.0, linestyle=(0, (2, 2)))
    axes.set_title("purity (dotted: of all)")
