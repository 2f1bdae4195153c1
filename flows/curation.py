"""Curation, every night: what is new in the sources → index → score → select under a budget → publish → drift.

A run is ``DIR/runs/NNNN``: ``intake`` (what is new), ``result`` (what is selected and why), and ``run.json`` when it is
over. A run that was killed is finished first: its intake stands, and once its result stands its configuration does too.
"""

import base64
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from flows.curation_config import CurationConfig, load
from flows.rundir import claimed, surroundings
from tasks.common.errors import InputError
from tasks.common.files import read_json, sha256_json, write_json, write_text
from tasks.common.models import locate, torch_dtype
from tasks.common.stage import MANIFEST, run_stage, whole, whole_or_none
from tasks.face import reporter, settle, worth_retrying
from tasks.pool import intake as intakes
from tasks.pool.intake import Found, look, take_in
from tasks.reporting.curation import PICTURED, runs_png
from tasks.scoring.growing import Place, QuerySet, grow, place_of, read_queries, search_for
from tasks.scoring.index import MANIFEST as INDEX_MANIFEST
from tasks.selection import publish as publishing
from tasks.selection.curation_ledger import LEDGER, SELECTED, LedgerSeen, Recorded, check_ledger, record, recorded
from tasks.selection.drift import READ
from tasks.selection.publish import CARD_TEXT, RESULT, card_text, select_best

BEGUN, RUN, LATEST = "begun.json", "run.json", "latest"
CHECKED = 8
"""Runs that are over, beside the last, whose files a run reads to see that they are as they were written."""
_SHOWN = 30
"""Runs in the picture of the UI."""


def _title() -> str:
    return Path(str(flow_run.parameters["conf"])).stem


@flow(name="curation", flow_run_name=_title, log_prints=False)
def curation(
    conf: Annotated[str, Field(min_length=1)] = "conf/curation/demo.yaml",
    directory: str = "",
    documents: Annotated[int | None, Field(ge=1, le=1_000_000_000)] = None,
    settings: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Take in what is new in the sources, score it, and publish the best so far.

    Args:
        conf: Path of the YAML file with sources, queries, model and budget, on the machine of the worker.
        directory: Directory of the curation: its index, ledger and selections. Empty: runs/NAME of the configuration.
        documents: Most documents to select, in place of the configuration's budget.documents.
        settings: Further fields of the configuration to override, each as a.b=value.

    Returns:
        ``run``, ``digest``, ``new``, ``selected``, ``published`` (directory of the selection that stands, or None).
    """
    wanted = (f"budget.documents={documents}",) if documents is not None else ()
    config = load(Path(conf), (*settings, *wanted))
    out = Path(directory or Path("runs") / config.name)
    with claimed(out, config.place):
        return _Curation(config, out).run()


@task(name="take in", task_run_name="take in {run}", retries=2, retry_delay_seconds=5,
      retry_condition_fn=worth_retrying)  # fmt: skip
def _take_in(config: CurationConfig, found: Sequence[Found], seen: LedgerSeen, directory: str, *, run: int) -> Any:
    """New documents of the sources."""
    return settle(run_stage(
        Path(directory), stage="intake", version=intakes.VERSION,
        config={**config.intake.plain(), "seed": config.seed},
        inputs={"run": str(run), "files": sha256_json([[one.key, one.sha256] for one in found])},
        work=lambda out: take_in(config.intake, found, seen, out, seed=config.seed, report=reporter("near duplicates")),
    ))  # fmt: skip


@task(name="score", task_run_name="score {run}")
def _score(
    config: CurationConfig, place: Place, taken: Sequence[Path], documents: int, *, run: int
) -> dict[str, int]:
    """Signatures of the documents that the index lacks."""
    return grow(place, config.scorer, config.signature, taken, documents, report=reporter("scoring new documents"))


@task(name="select", task_run_name="select {run}")
def _select(
    config: CurationConfig, place: Place, queries: QuerySet, taken: Sequence[Path], facts: dict[str, Any],
    out: Path, directory: str, *, run: int, since: int, published: Path | None,
) -> Any:  # fmt: skip
    """Search of the index for the queries, and the best under the budget."""

    def work(into: Path) -> int:
        scored = search_for(place, config.scorer, config.signature, queries, taken, last=since < run)
        return select_best(out, taken[-1], scored, into, run=run, since=since, documents=facts["index_documents"],
                           budget=config.budget, positive=config.positive, facts=facts, published=published)

    return settle(run_stage(
        Path(directory), stage="result", version=publishing.VERSION,
        config={"budget": config.budget.plain(), "positive": config.positive, "since": since},
        inputs={"facts": sha256_json(facts), "published": str(published and published.parent.name)}, work=work,
    ))  # fmt: skip


@task(name="publish", task_run_name="publish {run}")
def _publish(result: Path, taken: Sequence[Path], directory: str, *, run: int) -> Any:
    """The versioned selection with its card."""
    return settle(run_stage(
        Path(directory), stage="selection", version=publishing.VERSION, config={},
        inputs={"result": read_json(result / MANIFEST)["ref"]["digest"]},
        work=lambda out: publishing.publish(result, taken, out),
    ))  # fmt: skip


class _Curation:
    """One call of the flow."""

    def __init__(self, config: CurationConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.log = get_run_logger()
        self.known: dict[int, Recorded] = {}
        """The runs that are over, as the ledger has them; a run that was killed behind its row is not one of them."""

    def run(self) -> dict[str, Any]:
        """Finish the run that was killed, then make one if anything is new."""
        self.check()
        number = len(self.known) + 1
        if whole_or_none(self.folder(number) / "result") is not None:
            self.finish(number)
            number += 1
        place = place_of(self.out, self.config.scorer, self.config.signature)
        queries = read_queries(self.config.queries)
        taken = self.folder(number) / "intake"
        if not (taken / MANIFEST).exists():
            seen = LedgerSeen(self.out / LEDGER, {run: self.folder(run) / "intake" for run in self.known})
            found = look(self.config.intake, seen, self.out / "digests.json")
            if not found and number > 1:
                last = self.result(number - 1)
                if self.basis(place, queries, last["documents"]) == last["basis"]:
                    return self.outcome(number - 1, "nothing is new")
            if not (self.folder(number) / BEGUN).exists():
                write_json(self.folder(number) / BEGUN, {"started": _now()}, checked=True)
            state = _take_in(self.config, found, seen, str(taken), run=number, return_state=True)
            state.result()
        self.make(number, place, queries)
        return self.finish(number)

    def check(self) -> None:
        """See that the runs that are over are as they were written; make what is made of them again where it is not.

        The files of some of them are read (:func:`in_turn`), so that a night takes no longer however many there were.
        Whatever a run is made from is looked at where it is read.

        Raises:
            InputError: naming what is missing or damaged.
        """
        finished = self.finished()
        if missing := {*range(1, len(finished) + 1)} - {*finished}:
            raise InputError("is missing; restore it from a copy", file=self.folder(min(missing)) / RUN)
        check_ledger(self.out / LEDGER)
        self.known = {run: entry for run, entry in recorded(self.out / LEDGER).items()
                      if run in finished}  # fmt: skip
        for number in sorted(in_turn(len(finished)) | ({*finished} - {*self.known})):
            entry = self.entry(number)
            whole(self.folder(number) / "intake")
            self.result(number)
            if number not in self.known:
                self.remember(entry)
        if standing := self.standing():
            if whole_or_none(self.selection(standing)) is None:
                state = _publish(self.folder(standing) / "result", self.intakes(standing),
                                 str(self.selection(standing)), run=standing, return_state=True)  # fmt: skip
                state.result()
            self.point(standing)

    def standing(self) -> int | None:
        """The run whose selection stands."""
        return max((run for run, entry in self.known.items() if entry.published), default=None)

    def point(self, run: int) -> None:
        """Let ``latest`` name the selection of a run."""
        line = f"{self.selection(run).relative_to(self.out).as_posix()}\n"
        latest = self.out / LATEST
        if not latest.is_file() or latest.read_bytes() != line.encode():
            write_text(latest, line)

    def selection(self, run: int) -> Path:
        return self.out / "selections" / f"{run:04d}"

    def folder(self, run: int) -> Path:
        return self.out / "runs" / f"{run:04d}"

    def finished(self) -> list[int]:
        """Numbers of the runs that are over."""
        return sorted(int(path.parent.name) for path in (self.out / "runs").glob(f"*/{RUN}"))

    def entry(self, run: int) -> dict[str, Any]:
        """What the ledger has of a run that is over."""
        return dict(read_json(self.folder(run) / RUN)["entry"])

    def result(self, run: int) -> dict[str, Any]:
        """What a run found.

        Raises:
            InputError: a file of it is damaged, or another version of this program made it.
        """
        folder = self.folder(run) / "result"
        whole(folder)
        if read_json(folder / MANIFEST)["version"] != publishing.VERSION:
            raise InputError("was made by another version of this program; go on with that, or begin another "
                             "directory", file=folder)  # fmt: skip
        return dict(read_json(folder / RESULT))

    def intakes(self, run: int) -> list[Path]:
        """Intakes of all runs up to this one."""
        return [self.folder(number) / "intake" for number in range(1, run + 1)]

    def basis(self, place: Place, queries: QuerySet, documents: int) -> dict[str, Any]:
        """All that decides a selection beside the documents; how many there are, while they decide the calibration."""
        return {"index": place.name(documents), "queries": queries.digest, "budget": self.config.budget.plain(),
                "positive": self.config.positive}  # fmt: skip

    def make(self, run: int, place: Place, queries: QuerySet) -> None:
        """Score what this run took in and select from everything."""
        config, last = self.config, self.result(run - 1) if run > 1 else None
        intake = whole(self.folder(run) / "intake")
        total = intake.rows + (last["documents"] if last else 0)
        held = {"documents": 0, "tokens": 0}
        if total:
            state = _score(config, place, self.intakes(run), total, run=run, return_state=True)
            held = state.result()
        earlier = [entry for entry in self.known.values() if place.has(entry.index)]
        standing = self.standing()
        dropped, skipped = _left_out(intake.dir)
        basis = self.basis(place, queries, total)
        facts = {
            "name": config.name, "title": config.title, "basis": basis, "config": config.plain(),
            "config_digest": sha256_json(config.plain()), "index_documents": held["documents"],
            "index_tokens": held["tokens"], "duplicates": dropped, "skipped": skipped,
            "scored_documents": held["documents"] - sum(entry.scored_documents for entry in earlier),
            "scored_tokens": held["tokens"] - sum(entry.scored_tokens for entry in earlier),
            "made_of": [self.entry(run - 1)["digest"] if last else None, intake.digest],
            "index_digest": read_json(place.searched / INDEX_MANIFEST)["sha256"] if total else None,
            "why": {"queries": str(config.queries), "count": len(queries.table)},
            "by": self.model() | {"stored": config.signature.stored, "sketch": config.signature.sketch.plain(),
                                  "calibration": config.signature.fit.name if config.signature.fit else "none",
                                  "fitted_on": read_json(place.begun).get("fitted_on", total) if total else 0},
        }  # fmt: skip
        same = (last is not None and basis["index"] == place.key
                and all(last["basis"][name] == basis[name] for name in ("index", "queries")))  # fmt: skip
        state = _select(config, place, queries, self.intakes(run), facts, self.out, str(self.folder(run) / "result"),
                        run=run, since=last["since"] if last and same else run,
                        published=self.folder(standing) / "result" if standing else None, return_state=True)
        state.result()

    def model(self) -> dict[str, Any]:
        scorer = self.config.scorer
        return {"model": scorer.model, "revision": scorer.revision, "max_length": scorer.max_length,
                "digest": locate(scorer.model, revision=scorer.revision).digest,
                "precision": str(torch_dtype(scorer.precision)).removeprefix("torch.")}  # fmt: skip

    def finish(self, run: int) -> dict[str, Any]:
        """Publish what a run selected, write it into the ledger, and end the run; from its files alone."""
        folder, result = self.folder(run), self.result(run)
        refs = [whole(folder / "intake"), whole(folder / "result")]
        selection = self.selection(run)
        if result["publish"]:
            state = _publish(folder / "result", self.intakes(run), str(selection), run=run, return_state=True)
            refs.append(state.result())
        earlier = self.entry(run - 1)["digest"] if run > 1 else None
        entry = {
            "run": run, "started": read_json(folder / BEGUN)["started"], "finished": _now(),
            "config_digest": result["config_digest"],
            "digest": sha256_json({"earlier": earlier, "made": [ref.digest for ref in refs]}),
            "index": result["basis"]["index"], "queries": result["basis"]["queries"],
            "files": len(read_json(folder / "intake" / intakes.FILES)), "new_documents": refs[0].rows,
            "duplicates": result["duplicates"], "skipped": result["skipped"], "documents": result["documents"],
            "scored_documents": result["scored_documents"], "scored_tokens": result["scored_tokens"],
            "selected": result["selected"], "published": result["publish"],
        }  # fmt: skip
        self.remember(entry)
        if result["publish"]:
            self.point(run)
        write_json(folder / RUN, {"entry": entry, "surroundings": surroundings(sys.argv)}, checked=True)
        what = ("published" if result["publish"] else "the selection is as it was" if result["selected"]
                else "no document is within the budget")  # fmt: skip
        outcome = self.outcome(run, what)
        _show([self.result(number) for number in range(max(1, run - _SHOWN + 1), run + 1)], outcome)
        return outcome

    def remember(self, entry: dict[str, Any]) -> None:
        """Put a run into the ledger."""
        folder = self.folder(entry["run"])
        record(self.out / LEDGER, entry, folder / "intake", folder / "result")
        self.known[entry["run"]] = Recorded.of(entry)

    def outcome(self, run: int, what: str) -> dict[str, Any]:
        """What the flow returns, of the last run that is over."""
        entry = self.entry(run)
        latest = self.out / LATEST
        standing = str(self.out / latest.read_text(encoding="utf-8").strip()) if latest.exists() else None
        outcome = {"run": run, "what": what, "digest": entry["digest"], "new": entry["new_documents"],
                   "duplicates": entry["duplicates"], "skipped": entry["skipped"], "selected": entry["selected"],
                   "published": standing}  # fmt: skip
        self.log.info("run %d: %s; %d new documents, %d selected; %s", run, what, outcome["new"], outcome["selected"],
                      standing)  # fmt: skip
        return outcome


def in_turn(runs: int) -> set[int]:
    """Of so many runs that are over those whose files are looked at now: the last, and :data:`CHECKED` more at most.

    While their number is between two powers of two a window goes round over as many places as the larger one, so that
    each run is looked at once in 2 ``runs`` / :data:`CHECKED` runs.
    """
    if not runs:
        return set()
    places = 1 << (runs - 1).bit_length()
    window = {(CHECKED * runs + place) % places + 1 for place in range(CHECKED)}
    return {runs, *(run for run in window if run <= runs)}


def _now() -> str:
    """The time in UTC, as the ledger has it."""
    return datetime.now(UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="seconds")


def _left_out(intake: Path) -> tuple[int, int]:
    """Numbers of repeats and of bad rows."""
    import pyarrow.parquet as pq

    skipped = (intake / intakes.SKIPPED).read_text(encoding="utf-8").count("\n")
    return pq.ParquetFile(intake / intakes.DROPPED).metadata.num_rows, skipped


def _show(results: Sequence[dict[str, Any]], outcome: dict[str, Any]) -> None:
    """The last of some runs in the UI: where its files are, a picture of all of them, its card, purity and drift."""
    result = results[-1]
    name = result["name"].replace("_", "-")
    lines = [f"**Run {result['run']}: {outcome['what']}.**"]
    if where := outcome["published"]:
        files = (("Selection", SELECTED), ("Card", CARD_TEXT), ("Ledger", f"../../{LEDGER}"))
        lines += [f"- {title}: `{Path(where, file).resolve()}`" for title, file in files]
    picture = base64.b64encode(runs_png(results)).decode()
    shown = [lines[0], "", *lines[1:], "", f"![The runs](data:image/png;base64,{picture})", "", PICTURED, "",
             card_text(result)]  # fmt: skip
    create_markdown_artifact("\n".join(shown), key=f"{name}-selection",
                             description="What was selected, why, from where, by which model")  # fmt: skip
    drift = [{"what": what, "value": round(value, 4)} for what, value in result["drift"].items()]
    create_table_artifact(drift, key=f"{name}-drift", description=READ)
    if result["labels"]:
        create_table_artifact(
            [{"label": f"{label}{' (purity)' if label == result['positive'] else ''}",
              "% of all": round(100 * row["pool"], 1), "% of the selection": round(100 * row["selected"], 1)}
             for label, row in result["labels"].items()],
            key=f"{name}-purity", description="Labels of the selection",
        )  # fmt: skip
