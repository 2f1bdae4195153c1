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
from tasks.common.stage import MANIFEST, Ref, find, run_stage
from tasks.face import reporter, settle, worth_retrying
from tasks.pool import intake as intakes
from tasks.pool.intake import Found, look, take_in
from tasks.reporting.curation import PICTURED, runs_png
from tasks.scoring.growing import Place, QuerySet, grow, place_of, read_queries, search_for
from tasks.scoring.index import MANIFEST as INDEX_MANIFEST
from tasks.scoring.index import Index
from tasks.selection import publish as publishing
from tasks.selection.curation_ledger import LEDGER, SELECTED, LedgerSeen, record, recorded
from tasks.selection.drift import READ
from tasks.selection.publish import CARD_TEXT, RESULT, card_text, select_best

BEGUN, RUN, LATEST = "begun.json", "run.json", "latest"
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
def _score(config: CurationConfig, place: Place, taken: Sequence[Path], *, run: int) -> dict[str, int]:
    """Signatures of the documents that the index lacks."""
    return grow(place, config.scorer, config.signature, taken, report=reporter("scoring new documents"))


@task(name="select", task_run_name="select {run}")
def _select(
    config: CurationConfig, place: Place, queries: QuerySet, taken: Sequence[Path], facts: dict[str, Any],
    directory: str, *, run: int, same_scores: bool, published: Path | None,
) -> Any:  # fmt: skip
    """Search of the index for the queries, and the best under the budget."""
    held = place if facts["index_documents"] else None

    def work(out: Path) -> int:
        scores = search_for(place, config.scorer, queries) if held else None
        return select_best(held, scores, taken, out, budget=config.budget, positive=config.positive, facts=facts,
                           same_scores=same_scores, published=published)  # fmt: skip

    return settle(run_stage(
        Path(directory), stage="result", version=publishing.VERSION,
        config={"budget": config.budget.plain(), "positive": config.positive, "same_scores": same_scores},
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
        self.intake_digests: dict[int, str] = {}
        """Of the runs that are over."""

    def run(self) -> dict[str, Any]:
        """Finish the run that was killed, then make one if anything is new."""
        self.check()
        number = len(self.finished()) + 1
        if _found(self.folder(number) / "result") is not None:
            self.finish(number)
            number += 1
        place = place_of(self.out, self.config.scorer, self.config.signature)
        queries = read_queries(self.config.queries)
        taken = self.folder(number) / "intake"
        if not (taken / MANIFEST).exists():
            seen = LedgerSeen(self.out / LEDGER, {run: self.folder(run) / "intake" for run in self.finished()})
            found = look(self.config.intake, seen, self.out / "digests.json")
            if not found and number > 1 and self.basis(place, queries) == self.result(number - 1)["basis"]:
                return self.outcome("nothing is new")
            if not (self.folder(number) / BEGUN).exists():
                write_json(self.folder(number) / BEGUN, {"started": _now()}, checked=True)
            state = _take_in(self.config, found, seen, str(taken), run=number, return_state=True)
            state.result()
        self.make(number, place, queries)
        return self.finish(number)

    def check(self) -> None:
        """See that the runs that are over are as they were written; make what is made of them again where it is not.

        Raises:
            InputError: naming what is missing or damaged.
        """
        finished, known = self.finished(), recorded(self.out / LEDGER)
        for number in range(1, len(finished) + 1):
            if number not in finished:
                raise InputError("is missing; restore it from a copy", file=self.folder(number) / RUN)
            entry = read_json(self.folder(number) / RUN)["entry"]
            self.intake_digests[number] = _whole(self.folder(number) / "intake").digest
            _whole(self.folder(number) / "result")
            if number not in known:
                self.remember(entry)
        standing = next((number for number in reversed(finished) if self.result(number)["publish"]), None)
        if standing is not None:
            if _found(self.selection(standing)) is None:
                state = _publish(self.folder(standing) / "result", self.intakes(standing),
                                 str(self.selection(standing)), run=standing, return_state=True)  # fmt: skip
                state.result()
            self.point(standing)

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

    def result(self, run: int) -> dict[str, Any]:
        """What a run found."""
        return dict(read_json(self.folder(run) / "result" / RESULT))

    def intakes(self, run: int) -> list[Path]:
        """Intakes of all runs up to this one."""
        return [self.folder(number) / "intake" for number in range(1, run + 1)]

    def basis(self, place: Place, queries: QuerySet) -> dict[str, Any]:
        """All that decides a selection beside the documents."""
        return {"index": place.key, "queries": queries.digest, "budget": self.config.budget.plain(),
                "positive": self.config.positive}  # fmt: skip

    def make(self, run: int, place: Place, queries: QuerySet) -> None:
        """Score what this run took in and select from everything."""
        config, before = self.config, [self.result(number) for number in range(1, run)]
        intake = _whole(self.folder(run) / "intake")
        total = intake.rows + sum(result["new"] for result in before)
        held = {"documents": 0, "tokens": 0}
        if total:
            state = _score(config, place, self.intakes(run), run=run, return_state=True)
            held = state.result()
        last = next((result for result in reversed(before) if result["basis"]["index"] == place.key), None)
        published = next((result["run"] for result in reversed(before) if result["publish"]), None)
        dropped, skipped = _left_out(intake.dir)
        basis = self.basis(place, queries)
        facts = {
            "name": config.name, "title": config.title, "basis": basis, "config": config.plain(),
            "config_digest": sha256_json(config.plain()), "index_documents": held["documents"],
            "index_tokens": held["tokens"], "duplicates": dropped, "skipped": skipped,
            "scored_documents": held["documents"] - (last["index_documents"] if last else 0),
            "scored_tokens": held["tokens"] - (last["index_tokens"] if last else 0),
            "intakes": [*(self.intake_digests[number] for number in range(1, run)), intake.digest],
            "index_digest": read_json(place.index / INDEX_MANIFEST)["sha256"] if total else None,
            "why": {"queries": str(config.queries), "count": len(queries.table)},
            "by": self.model() | {"stored": config.signature.stored, "sketch": config.signature.sketch.plain(),
                                  **(_fit(Index(place.index)) if total else {"calibration": "none"})},
        }  # fmt: skip
        same = bool(before) and all(before[-1]["basis"][name] == basis[name] for name in ("index", "queries"))
        state = _select(config, place, queries, self.intakes(run), facts, str(self.folder(run) / "result"), run=run,
                        same_scores=same, published=self.folder(published) / "result" if published else None,
                        return_state=True)  # fmt: skip
        state.result()

    def model(self) -> dict[str, Any]:
        scorer = self.config.scorer
        return {"model": scorer.model, "revision": scorer.revision, "max_length": scorer.max_length,
                "digest": locate(scorer.model, revision=scorer.revision).digest,
                "precision": str(torch_dtype(scorer.precision)).removeprefix("torch.")}  # fmt: skip

    def finish(self, run: int) -> dict[str, Any]:
        """Publish what a run selected, write it into the ledger, and end the run; from its files alone."""
        folder, result = self.folder(run), self.result(run)
        refs = [_whole(folder / "intake"), _whole(folder / "result")]
        selection = self.selection(run)
        if result["publish"]:
            state = _publish(folder / "result", self.intakes(run), str(selection), run=run, return_state=True)
            refs.append(state.result())
        earlier = read_json(self.folder(run - 1) / RUN)["entry"]["digest"] if run > 1 else None
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
        self.intake_digests[run] = refs[0].digest
        outcome = self.outcome("published" if result["publish"] else "the selection is as it was" if result["selected"]
                               else "no document is within the budget")  # fmt: skip
        _show([self.result(number) for number in range(max(1, run - _SHOWN + 1), run + 1)], outcome)
        return outcome

    def remember(self, entry: dict[str, Any]) -> None:
        """Put a run into the ledger."""
        folder = self.folder(entry["run"])
        record(self.out / LEDGER, entry, folder / "intake", folder / "result")

    def outcome(self, what: str) -> dict[str, Any]:
        """What the flow returns, of the run that is over."""
        run = self.finished()[-1]
        entry = read_json(self.folder(run) / RUN)["entry"]
        latest = self.out / LATEST
        standing = str(self.out / latest.read_text(encoding="utf-8").strip()) if latest.exists() else None
        outcome = {"run": run, "what": what, "digest": entry["digest"], "new": entry["new_documents"],
                   "duplicates": entry["duplicates"], "skipped": entry["skipped"], "selected": entry["selected"],
                   "published": standing}  # fmt: skip
        self.log.info("run %d: %s; %d new documents, %d selected; %s", run, what, outcome["new"], outcome["selected"],
                      standing)  # fmt: skip
        return outcome


def _now() -> str:
    """The time in UTC, as the ledger has it."""
    return datetime.now(UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="seconds")


def _whole(directory: Path) -> Ref:
    """The reference to a stage's whole result, whatever it was made from.

    Raises:
        InputError: it is not there.
    """
    ref = _found(directory)
    if ref is None:
        raise InputError("is damaged, or not whole; restore it from a copy", file=directory)
    return ref


def _found(directory: Path) -> Ref | None:
    """The same, or None."""
    try:
        return find(directory, str(read_json(directory / MANIFEST)["key"]))
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None


def _fit(index: Index) -> dict[str, Any]:
    """An index's calibration, and the number of documents that the index was begun with: it was fitted on them."""
    return {"calibration": index.calibration_name, "fitted_on": index.manifest["batches"][0]["documents"]}


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
