"""The report of a run's directory: the ledger, and the facts that the run wrote beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.common.config import read_yaml
from tasks.common.errors import InputError
from tasks.common.files import read_json
from tasks.reporting.report import Facts, write_report

LEDGER, CONFIG, MANIFEST = "study.duckdb", "config.yaml", "manifest.json"
REPORT, RESULTS = "report.html", "results.json"


def report_run(directory: Path, *, excerpts: bool = True, out: Path | None = None) -> Path:
    """Write the report of a finished run or study, and its results as ``results.json`` where ``out`` is not given.

    Args:
        directory: the run: ledger, resolved configuration, manifest and the stages' folders.
        excerpts: show a few documents of the pool an arm; the report of a study has none in any case.
        out: the HTML file; None is ``report.html`` in the run's directory.

    Returns:
        The report's path.

    Raises:
        InputError: the directory holds no finished run, or a curation.
    """
    config = read_yaml(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    if config.get("kind") == "curation":
        raise InputError("holds a curation, whose selections have cards: selections/NNNN/card.md", file=directory)
    if not (directory / MANIFEST).is_file():
        raise InputError("holds no finished run; `rise run`, or `rise study`, with the same --out finishes one",
                         file=directory)  # fmt: skip
    if "methods" in config and "subsets" not in config:  # those belong to a linear datamodeling score
        from tasks.reporting.study import report_study

        return report_study(directory, out=out)
    if "arms" not in config:
        raise InputError("holds no closed loop and no study, and has no such report", file=directory)
    report = out or directory / REPORT
    write_report(
        directory / LEDGER, config, run_facts(directory, config), report,
        results_out=None if out else directory / RESULTS, excerpts=excerpts,
    )  # fmt: skip
    return report


def run_facts(directory: Path, config: dict[str, Any]) -> Facts:
    manifest = read_json(directory / MANIFEST)
    around = manifest["surroundings"]
    program, _, arguments = around["command"].partition(" ")
    hardware = {name: ", ".join(value) if isinstance(value, list) else value
                for name, value in around["machine"].items()}  # fmt: skip
    card = directory / "pool" / "card.json"
    facts = Facts(
        date=around["date"],
        command=f"{Path(program).name} {arguments}",  # where a program is installed says nothing about a run
        hardware={name.replace("_", " "): value for name, value in hardware.items() if value},
        versions={"python": around["python"], **around["versions"]},
        digests={"run": manifest["digest"], "ledger": manifest["ledger"]},
        sources=read_json(card)["sources"] if card.is_file() else {},
        notes=_notes(directory),
    )
    if around["commit"]:
        facts["commit"] = around["commit"]
    if config.get("title"):
        facts["title"] = config["title"]
    return facts


def _notes(directory: Path) -> list[str]:
    """What the stages want a reader to know, each note once."""
    notes: dict[str, None] = {}
    for file in sorted(directory.glob("*/*/notes.json")):
        for note in read_json(file):
            notes[note if isinstance(note, str) else f"{note['metric']}: {note['note']}"] = None
    return list(notes)
