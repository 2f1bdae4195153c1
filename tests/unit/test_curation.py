"""Curation: what is new, the budget, drift, one index a model, versioned selections, the ledger, and going on."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from flows import curation as flow
from flows import plan as planning
from flows.cli import rise
from flows.curation_config import load
from flows.rundir import claimed
from flows.status import status_lines
from tasks.common.errors import InputError
from tasks.common.files import read_json, sha256_file, write_json
from tasks.pool.duplicates import DuplicateIndex
from tasks.pool.intake import DOCUMENTS, DROPPED, IntakeConfig, look, take_in
from tasks.reporting.curation import runs_png
from tasks.reporting.run import report_run
from tasks.scoring import convert, engine, growing, spread
from tasks.scoring.index import Index
from tasks.scoring.spread import Spread
from tasks.scoring.store import bytes_a_document
from tasks.selection import curation_ledger
from tasks.selection.budget import BudgetConfig, choose
from tasks.selection.candidates import Candidate
from tasks.selection.curation_ledger import LEDGER, LedgerSeen, curation_digest, open_curation
from tasks.selection.drift import drift, psi
from tasks.selection.publish import card_text
from tests.flow.conftest import texts
from tests.tiny import tiny_llama


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [tiny_llama(folder / str(seed), seed=seed) for seed in (0, 1)]


@pytest.fixture
def conf(models: list[Path], tmp_path: Path) -> Path:
    """A curation of a folder with two files; a third can be moved in with :func:`arrive`."""
    write = {"control": texts(20, 0), "junk": texts(16, 1)}
    for label, some in write.items():
        jsonl(tmp_path / "inbox" / f"{label}.jsonl", [{"text": text, "label": label, "source": f"from {label}"}
                                                      for text in some])  # fmt: skip
    jsonl(tmp_path / "queries.jsonl", [{"id": f"q{i}", "text": text} for i, text in enumerate(texts(3, 2))])
    path = tmp_path / "cur.yaml"
    path.write_text(yaml.safe_dump({
        "name": "cur", "intake": {"sources": {"inbox": {"folder": str(tmp_path / "inbox")}}},
        "queries": str(tmp_path / "queries.jsonl"), "budget": {"documents": 6}, "positive": "control",
        "scorer": {"model": str(models[0]), "precision": "float32", "batch_tokens": 600, "shard_tokens": 1500,
                   "max_length": 96, "threads": 1},
        "signature": {"sketch": {"kr": 16, "kh": 6, "kg": 12}, "enough": 1},
    }))  # fmt: skip
    return path


def arrive(conf: Path, name: str = "more.jsonl", *, seed: int = 3, count: int = 8) -> list[str]:
    """New documents in the folder, and a repeat of an old one."""
    made = texts(count, seed)
    jsonl(conf.parent / "inbox" / name, [*({"text": text} for text in made), {"id": "again", "text": texts(20, 0)[0]}])
    return made


Curate = Callable[..., dict[str, Any]]


class Killed(BaseException):
    pass


def stop(*_: Any, **__: Any) -> None:
    raise Killed



@pytest.fixture
def curate(monkeypatch: pytest.MonkeyPatch, conf: Path) -> Curate:
    """The flow without Prefect: its tasks called as functions."""

    def plain(task: Any) -> Any:
        def call(*arguments: Any, return_state: bool, **options: Any) -> Any:
            assert return_state
            made = task.fn(*arguments, **options)
            return SimpleNamespace(result=lambda: getattr(made, "data", made))

        return call

    for name in ("_take_in", "_score", "_select", "_publish"):
        monkeypatch.setattr(flow, name, plain(getattr(flow, name)))
    monkeypatch.setattr(flow, "reporter", lambda what: None)
    monkeypatch.setattr(flow, "get_run_logger", lambda: logging.getLogger("curation"))
    monkeypatch.setattr(flow, "_show", lambda *_: None)  # tests/flow has it

    def run(out: Path, *settings: str) -> dict[str, Any]:
        config = load(conf, settings)
        with claimed(out, config.place):
            return flow._Curation(config, out).run()

    return run


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Documents of every forward pass."""
    made: list[int] = []
    real = engine.forward

    def counted(readout: Any, documents: Any, shard: range, **options: Any) -> Any:
        made.append(len(shard))
        return real(readout, documents, shard, **options)

    monkeypatch.setattr(engine, "forward", counted)
    return made


def ask(out: Path, sql: str) -> list[tuple[Any, ...]]:
    with open_curation(out / LEDGER) as con:
        return con.execute(sql).fetchall()


# What is new ----------------------------------------------------------------------------------------------------------


def taken(config: IntakeConfig, out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    seen = LedgerSeen(out / "none.duckdb", {})
    take_in(config, look(config, seen, out / "cache.json"), seen, out, seed=1)
    return pq.read_table(out / DOCUMENTS).to_pylist(), pq.read_table(out / DROPPED).to_pylist()


def test_repeats_are_dropped_and_named(tmp_path: Path) -> None:
    first = texts(1, 5)[0]
    jsonl(tmp_path / "in" / "a.jsonl", [{"id": "one", "text": first}, {"id": "two", "text": first.upper()}])
    jsonl(tmp_path / "in" / "b.jsonl", [{"id": "one", "text": first}, {"id": "near", "text": first + " x"},
                                        {"id": "new", "text": texts(1, 6)[0]}])  # fmt: skip
    jsonl(tmp_path / "in" / "c.jsonl", [{"id": "one", "text": "something else"}])
    jsonl(tmp_path / "in" / ".hidden.jsonl", [{"id": "hidden", "text": "not read"}])
    kept, dropped = taken(IntakeConfig(sources={"s": {"folder": tmp_path / "in"}}), tmp_path)
    assert [row["doc_id"] for row in kept] == ["one", "new"]
    assert [(row["doc_id"], row["kind"], row["of"]) for row in dropped] == [
        ("two", "exact", "one"), ("one", "changed", "one"), ("near", "near", "one")]  # fmt: skip
    assert {row["source"] for row in kept} == {"s"}
    assert kept[1]["file"] == "s/b.jsonl"


def test_near_duplicates_are_those_of_the_pool_stage(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    some = texts(30, 7)
    some += [" ".join(word for word in text.split() if rng.random() > 0.3) or "x" for text in some]
    rows = [{"id": f"{i:02d}", "text": text} for i, text in enumerate(some)]
    jsonl(tmp_path / "in" / "a.jsonl", rows)
    kept, dropped = taken(IntakeConfig(sources={"s": {"folder": tmp_path / "in"}}, near_duplicate=0.5), tmp_path)
    index = DuplicateIndex(0.5, 1)
    assert [row["doc_id"] for row in kept] == [row["id"] for row in rows if index.add(row["text"]) is None]
    assert 2 < len(dropped) < 30


def test_bad_rows_and_files_are_listed_or_end_the_run(tmp_path: Path) -> None:
    jsonl(tmp_path / "in" / "a.jsonl", [{"text": "good"}, {"text": ""}])
    (tmp_path / "in" / "b.parquet").write_bytes(b"no parquet")
    sources = {"s": {"folder": tmp_path / "in"}}
    kept, _ = taken(IntakeConfig(sources=sources), tmp_path / "skip")
    listed = [json.loads(line) for line in (tmp_path / "skip" / "skipped.jsonl").read_text().splitlines()]
    assert len(kept) == 1
    assert [(row["file"], row["row"], row["field"]) for row in listed] == [
        ("s/a.jsonl", 2, "text"), ("s/b.parquet", 0, None)]  # fmt: skip
    with pytest.raises(InputError, match=r"a\.jsonl, row 2, field text"):
        taken(IntakeConfig(sources=sources, on_bad_row="error"), tmp_path / "error")


def test_a_data_set_is_read_when_it_changes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    jsonl(data / "train.jsonl", [{"body": text} for text in texts(3, 8)])
    config = IntakeConfig(sources={"hub": {"dataset": str(data), "text_field": "body"}})
    seen = LedgerSeen(tmp_path / "none.duckdb", {})
    [first] = look(config, seen, tmp_path / "cache.json")
    assert take_in(config, [first], seen, tmp_path / "out", seed=1) == 3
    jsonl(data / "more.jsonl", [{"body": "another"}])
    [second] = look(config, seen, tmp_path / "cache.json")
    assert second.key == first.key
    assert second.sha256 != first.sha256


@pytest.mark.parametrize(("source", "problem"), [
    ({"folder": "a", "dataset": "b"}, "exactly one"), ({}, "exactly one"),
    ({"folder": "a", "pattern": "../*"}, "leaves the folder"),
])  # fmt: skip
def test_a_source_that_cannot_be(source: dict[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        IntakeConfig(sources={"s": source})


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    config = IntakeConfig(sources={"s": {"folder": tmp_path}})
    with pytest.raises(InputError, match="holds no"):
        look(config, LedgerSeen(tmp_path / "none", {}), tmp_path / "cache.json")


# The budget -----------------------------------------------------------------------------------------------------------

IDS, SCORES, SOURCES, TOKENS = "edcba", [1.0, 0.5, 0.5, 0.25, 2.0], "xyxyx", [4, 3, 9, 2, 1]


@pytest.mark.parametrize(("budget", "chosen"), [
    ({"documents": 3}, "aec"), ({"documents": 9}, "aecdb"), ({"threshold": 0.5}, "aecd"),
    ({"documents": 4, "quotas": {"x": 2}}, "aedb"), ({"documents": 4, "quotas": {"x": 0.5}}, "aedb"),
    ({"documents": 4, "quotas": {"y": 2, "*": 1}}, "adb"), ({"documents": 4, "quotas": {"x": 0}}, "db"),
    ({"tokens": 8}, "aed"), ({"tokens": 9}, "ae"), ({"tokens": 8, "threshold": 0.6}, "ae"),
    ({"tokens": 100, "documents": 2}, "ae"), ({"threshold": 3}, ""),
])  # fmt: skip
def test_limits_hold_together(budget: dict[str, Any], chosen: str) -> None:
    best = sorted(map(Candidate, IDS, SOURCES, [None] * 5, [1] * 5, SCORES, TOKENS, "qqqqq"),
                  key=lambda one: (-one.score, one.doc_id))  # fmt: skip
    assert "".join(one.doc_id for one in choose(BudgetConfig(**budget), best)) == chosen


@pytest.mark.parametrize("budget", [{}, {"documents": 0}, {"tokens": 5, "quotas": {"x": 0.5}},
                                    {"documents": 5, "quotas": {"x": 1.5}}, {"threshold": float("nan")}])  # fmt: skip
def test_a_budget_that_cannot_be(budget: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        BudgetConfig(**budget)


# Drift ----------------------------------------------------------------------------------------------------------------


def test_drift_tells_another_distribution() -> None:
    rng = np.random.default_rng(0)
    before, same, other = rng.normal(size=4000), rng.normal(size=4000), rng.normal(1.0, size=4000)
    assert psi(before, same) < 0.02
    assert psi(before, other) > 0.5
    assert psi(np.zeros(5), np.zeros(5)) == 0.0
    figures = drift(before=before, now=other, new={"a": 2, "b": 1}, selected={"b": 1}, selected_now=1,
                    chosen=["x", "y"], chosen_before=["y", "z"])  # fmt: skip
    assert figures["ks"] == pytest.approx(0.383, abs=0.03)  # 2 Φ(1/2) − 1
    assert figures["share of new: a"] == pytest.approx(2 / 3)
    assert figures["share of the selection that is new"] == figures["share of the selection that stayed"] == 0.5


# Runs -----------------------------------------------------------------------------------------------------------------


def test_only_new_documents_are_scored(conf: Path, curate: Curate, passes: list[int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = curate(out)
    assert (first["new"], first["selected"], sum(passes)) == (36, 6, 36 + 3)
    made = arrive(conf)
    passes.clear()
    second = curate(out)
    assert (second["run"], second["new"], second["duplicates"], sum(passes)) == (2, 8, 1, 8)
    [index] = [path for path in (out / "indexes").iterdir() if path.is_dir()]
    assert [batch["documents"] for batch in Index(index).manifest["batches"]] == [36, 8]
    assert ask(out, "SELECT run, scored_documents, new_documents, documents FROM runs ORDER BY run") == [
        (1, 36, 36, 36), (2, 8, 8, 44)]  # fmt: skip
    assert ask(out, "SELECT run, count(*) FROM scores GROUP BY run ORDER BY run") == [(1, 36), (2, 8)]
    new = {row[0] for row in ask(out, "SELECT doc_id FROM documents WHERE first_run = 2")}
    assert len(new) == len(made)


def test_nothing_new_publishes_nothing(curate: Curate, passes: list[int], conf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = curate(out)
    digest = curation_digest(out / LEDGER)
    passes.clear()
    (conf.parent / "inbox" / "junk.jsonl").touch()
    again = curate(out)
    assert (again["what"], again["run"], again["digest"]) == ("nothing is new", 1, first["digest"])
    assert passes == []
    assert curation_digest(out / LEDGER) == digest
    assert [path.name for path in (out / "selections").iterdir()] == ["0001"]


def test_other_queries_search_again_without_a_pass(
    conf: Path, curate: Curate, passes: list[int], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    curate(out)
    passes.clear()
    other = jsonl(tmp_path / "other.jsonl", [{"id": f"o{i}", "text": text} for i, text in enumerate(texts(2, 9))])
    second = curate(out, f"queries={other}")
    assert (second["run"], second["new"], sum(passes)) == (2, 0, 2)
    assert {row[0] for row in ask(out, "SELECT DISTINCT query FROM selections WHERE run = 2")} <= {"o0", "o1"}
    assert ask(out, "SELECT count(*) FROM scores WHERE run = 2") == [(36,)]
    passes.clear()
    curate(out)  # back to the first queries: their signatures stand
    assert passes == []
    assert ask(out, "SELECT doc_id, rank, score, query FROM selections WHERE run = 3 ORDER BY rank") == ask(
        out, "SELECT doc_id, rank, score, query FROM selections WHERE run = 1 ORDER BY rank")  # fmt: skip


def test_another_model_begins_another_index(
    conf: Path, curate: Curate, passes: list[int], models: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    curate(out)
    arrive(conf)
    curate(out)
    passes.clear()
    curate(out, f"scorer.model={models[1]}")
    assert sum(passes) == 44 + 3
    assert len([path for path in (out / "indexes").iterdir() if path.is_dir()]) == 2
    arrive(conf, "third.jsonl", seed=10, count=5)
    passes.clear()
    curate(out)  # the old index still stands, and takes the new documents alone
    assert sum(passes) == 5
    assert ask(out, "SELECT run, scored_documents FROM runs ORDER BY run") == [(1, 36), (2, 8), (3, 44), (4, 5)]


def test_a_spread_is_that_of_the_first_runs_documents(conf: Path, curate: Curate, tmp_path: Path) -> None:
    out, compact = tmp_path / "out", ("signature.fit.name=median-bit+spread", "signature.sketch.alpha=1.0")
    curate(out, *compact)
    [index] = [path for path in (out / "indexes").iterdir() if path.is_dir()]
    first = {path.name: sha256_file(path) for path in index.glob("**/*.npy")}
    assert {"calibration.npy", "reference.npy", "00000.spread.npy"} <= set(first)
    arrive(conf)
    curate(out, *compact)
    second = {path.name: sha256_file(path) for path in index.glob("**/*.npy")}
    assert {name: second[name] for name in first} == first
    added = [shard for shard in Index(index).shards if f"{shard.number:05d}.spread.npy" not in first]
    assert added
    spread = Spread(np.load(index / "reference.npy"), dimension=Index(index).dimension)
    for shard in added:
        assert np.array_equal(shard.spread(slice(None)), spread(shard.arrays()["signatures"]))
    for run, held in ((1, 36), (2, 8)):
        assert ask(out, f"SELECT count(*) FROM scores WHERE run = {run}") == [(held,)]


EARLY = ("signature.enough=40", "signature.fit.name=median-bit+spread")


def test_few_documents_are_calibrated_by_each_run_anew(
    conf: Path, curate: Curate, passes: list[int], tmp_path: Path
) -> None:
    """12 documents, then 48 (enough is 40), then 53: nothing is scored twice, and no first run decides for the rest."""
    out, all_at_once = tmp_path / "out", tmp_path / "all"
    held = {path: path.read_text().splitlines(keepends=True) for path in (conf.parent / "inbox").iterdir()}
    for path, lines in held.items():
        path.write_text("".join(lines[:6]))
    curate(out, *EARLY)
    [early] = [path for path in (out / "indexes").iterdir() if path.is_dir()]
    assert (early.suffix, Index(early).stored, Index(early).calibration_name) == (".early", "fp32", "none")
    for path, lines in held.items():
        path.write_text("".join(lines))
    arrive(conf, count=12)
    curate(out, *EARLY)
    [index] = [path for path in (out / "indexes").iterdir() if path.is_dir()]
    assert (index.suffix, Index(index).stored, Index(index).calibration_name) == ("", "bit", "median-bit+spread")
    kept = sha256_file(index / "calibration.npy")
    arrive(conf, "last.jsonl", seed=12, count=5)
    third = curate(out, *EARLY)
    assert sum(passes) == 12 + 3 + 36 + 5
    assert sha256_file(index / "calibration.npy") == kept
    assert ask(out, "SELECT run, scored_documents, documents FROM runs ORDER BY run") == [
        (1, 12, 12), (2, 36, 48), (3, 5, 53)]  # fmt: skip
    assert ask(out, "SELECT run, count(*) FROM scores GROUP BY run ORDER BY run") == [(1, 12), (2, 48), (3, 5)]
    card = read_json(Path(third["published"]) / "card.json")
    assert (card["by"]["fitted_on"], card["by"]["calibration"]) == (48, "median-bit+spread")
    (conf.parent / "inbox" / "last.jsonl").unlink()
    curate(all_at_once, *EARLY)
    assert ask(all_at_once, "SELECT doc_id, score, query FROM scores") != []
    one = dict(ask(all_at_once, "SELECT doc_id, score FROM scores"))
    two = dict(ask(out, "SELECT doc_id, score FROM scores WHERE run = 2"))
    assert one.keys() == two.keys()
    assert [one[doc_id] for doc_id in one] == pytest.approx([two[doc_id] for doc_id in one], abs=1e-6)


def test_a_kill_as_the_calibration_is_kept_costs_nothing(
    conf: Path, curate: Curate, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough documents, and killed before, in and behind the conversion; another limit meanwhile."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    for place in (whole, out):
        curate(place, *EARLY)
    arrive(conf)
    curate(whole, *EARLY)
    for name in ("write_reference", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(convert.index if name == "finish" else spread.index, name, stop)
            with pytest.raises(Killed):
                curate(out, *EARLY)
    with monkeypatch.context() as patch:
        patch.setattr(growing.shutil, "rmtree", lambda path, **_: stop() if path.suffix == ".early" else None)
        with pytest.raises(Killed):
            curate(out, *EARLY)
    passes.clear()
    assert curate(out, *EARLY)["run"] == 2
    assert passes == []
    assert digests(out) == digests(whole)


def test_an_early_index_scores_as_one_of_bits_would(conf: Path, curate: Curate, tmp_path: Path) -> None:
    early, bits = tmp_path / "early", tmp_path / "bits"
    for out, enough in ((early, 1000), (bits, 1)):
        curate(out, EARLY[1], f"signature.enough={enough}")
    found = [dict(ask(out, "SELECT doc_id, score FROM scores")) for out in (early, bits)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert curate(early, EARLY[1], "signature.enough=1000")["what"] == "nothing is new"
    assert [Index(path).stored for path in sorted((early / "indexes").glob("*.early"))] == ["fp32"]
    assert status_lines(early)[-1].endswith("  whole, 36 documents")


def test_runs_are_drawn_side_by_side(conf: Path, curate: Curate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    curate(out)
    names = ["_hidden", "$x$", "\x01", *"abcdefghi"]
    jsonl(conf.parent / "inbox" / "odd.jsonl", [{"text": text, "source": name, "label": "control"}
                                                for text, name in zip(texts(12, 11), names, strict=True)])
    curate(out)
    results = [read_json(out / "runs" / run / "result" / "result.json") for run in ("0001", "0002")]
    one, two = runs_png(results[:1]), runs_png(results)
    assert one.startswith(b"\x89PNG")
    assert two == runs_png(results) != one
    for result in results:
        result["labels"] = {}
    width = [int.from_bytes(png[16:20], "big") for png in (two, runs_png(results))]
    assert width == [1012, 1012]
    assert len(runs_png(results)) < len(two) < 60_000  # without the panel of the purity


def test_status_says_what_is_missing(curate: Curate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    curate(out, "scorer.shard_tokens=100")
    assert "index" in status_lines(out)[-1]
    assert status_lines(out)[-1].endswith("  whole, 36 documents")
    [index] = [path for path in (out / "indexes").iterdir() if path.is_dir()]
    for path in (index / "manifest.json", out / "runs" / "0001" / "run.json"):
        path.unlink()
    shards = sorted((index / "shards").glob("*.json"))
    assert len(shards) > 3
    shards.pop().unlink()
    entries = [read_json(shard) for shard in shards]
    for number, shard in enumerate(shards):
        os.utime(shard, (1000.0 + 10 * number,) * 2)
    held, tokens = sum(entry["documents"] for entry in entries), [entry["tokens"] for entry in entries]
    assert len(tokens) > 20  # the rate is that of the last 20
    rate = sum(tokens[-19:]) / (10 * 19)
    left = (36 - held) * sum(tokens) / held / rate
    assert status_lines(out)[-1].endswith(f"  under way, {len(shards)} shards whole, {held} of 36 documents, "
                                          f"{rate:.0f} tokens a second, about {left:.0f} s left")  # fmt: skip


def test_a_run_is_planned(conf: Path, tmp_path: Path) -> None:
    def planned(*options: str) -> list[list[str]]:
        done = CliRunner().invoke(rise, ["plan", str(conf), "--gpu", "H100", *options])
        if done.exception is not None:
            raise done.exception
        return [re.split(r"  +", line) for line in done.output.splitlines()]

    lines = {line[0]: line[1:] for line in planned()}
    assert "all 36 documents of 2 files, as the first run takes them" in lines
    assert list(lines)[-6:-3] == ["take in", "score", "select"]
    some = {line[0]: line[1:] for line in planned("--documents", "1000", "--tokens", "90")}
    assert some["score"][0] == "90.0 k"
    assert some["score"][-1] == planning._bytes(1000 * bytes_a_document("bit", 6 * (16 + 12)))
    with pytest.raises(InputError, match="go together"):
        planned("--documents", "5")
    with pytest.raises(InputError, match="give --documents and --tokens"):
        planned("--set", "intake.sources.inbox={dataset: some/set}")


def test_a_curation_has_cards_in_place_of_a_report(curate: Curate, tmp_path: Path) -> None:
    curate(tmp_path / "out")
    with pytest.raises(InputError, match=r"selections/NNNN/card\.md"):
        report_run(tmp_path / "out")


def test_a_smaller_budget_publishes_a_version_beside(curate: Curate, passes: list[int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    curate(out)
    kept = sha256_file(out / "selections" / "0001" / "selected.parquet")
    passes.clear()
    second = curate(out, "budget.documents=4")
    assert (second["selected"], passes) == (4, [])
    assert (out / "latest").read_text() == "selections/0002\n"
    assert sha256_file(out / "selections" / "0001" / "selected.parquet") == kept
    assert curate(out, "budget.documents=4", "budget.threshold=9")["what"] == "no document is within the budget"
    assert (out / "latest").read_text() == "selections/0002\n"


def test_a_selection_says_where_it_comes_from(conf: Path, curate: Curate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    curate(out)
    arrive(conf, count=12)
    made = curate(out)
    folder = Path(made["published"])
    table = pq.read_table(folder / "selected.parquet")
    assert {"doc_id", "text", "source", "score", "rank", "n_tokens", "run", "query"} <= set(table.column_names)
    rows = table.to_pylist()
    assert [row["rank"] for row in rows] == list(range(1, 7))
    assert rows == sorted(rows, key=lambda row: (-row["score"], row["doc_id"]))
    assert all(row["n_tokens"] == len(row["text"].encode()) for row in rows)  # a byte tokenizer; not cut at 96
    assert any(row["n_tokens"] > 96 for row in rows)
    assert {row["run"] for row in rows} <= {1, 2}
    assert ask(out, f"""
        SELECT s.doc_id, s.score, s.query, d.first_run FROM selections s JOIN documents d USING (doc_id)
        WHERE s.run = {made['run']} ORDER BY rank""") == [
        (row["doc_id"], row["score"], row["query"], row["run"]) for row in rows]  # fmt: skip
    assert read_json(folder / "sha256.json")["selected.parquet"] == sha256_file(folder / "selected.parquet")
    card = read_json(folder / "card.json")
    assert card["earlier"] == 1
    assert card["labels"]["control"]["pool"] == pytest.approx(20 / 36)
    assert 0 <= card["drift"]["purity"] <= 1
    assert card["drift"]["psi"] >= 0
    assert "influence on 3 queries" in (folder / "card.md").read_text()


def test_the_card_says_when_its_calibration_rests_on_few_documents(curate: Curate, tmp_path: Path) -> None:
    curate(tmp_path / "out")
    card = read_json(tmp_path / "out" / "selections" / "0001" / "card.json")
    assert card["by"]["fitted_on"] == card["index_documents"]
    assert "A thin fit" not in card_text(card)
    card["index_documents"] = 10 * card["by"]["fitted_on"]
    assert f"fitted on the first {card['by']['fitted_on']} documents" in card_text(card)
    card["by"]["calibration"] = "none"
    assert "A thin fit" not in card_text(card)


def test_the_card_escapes_what_the_pool_says(curate: Curate, tmp_path: Path) -> None:
    curate(tmp_path / "out")
    card = read_json(tmp_path / "out" / "selections" / "0001" / "card.json")
    card["sources"] = {"<script>a</script>|[x](javascript:b)\n# y": {"seen": 1, "selected": 1}}
    text = card_text(card)
    assert "<script>" not in text
    assert "\\|\\[x\\](javascript:b) # y" in text


def test_a_place_is_of_one_curation_and_one_run(conf: Path, curate: Curate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    curate(out)
    with pytest.raises(InputError, match="near_duplicate"):
        curate(out, "intake.near_duplicate=0.9")
    with (out / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is at work"):
            curate(out)


def test_a_lost_ledger_is_made_again(conf: Path, curate: Curate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    curate(out)
    arrive(conf)
    curate(out)
    digest = curation_digest(out / LEDGER)
    (out / LEDGER).unlink()
    assert curate(out)["what"] == "nothing is new"
    assert curation_digest(out / LEDGER) == digest


def test_a_kill_while_the_ledger_is_begun_leaves_one_that_can_be_gone_on_with(
    curate: Curate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(curation_ledger, "_insert", stop)  # the tables are made, and nothing is committed
        with pytest.raises(KeyboardInterrupt):
            curate(tmp_path / "out")
    assert (tmp_path / "out" / LEDGER).exists()
    assert not curation_ledger.recorded(tmp_path / "out" / LEDGER)
    assert curate(tmp_path / "out")["run"] == 1
    assert [*curation_ledger.recorded(tmp_path / "out" / LEDGER)] == [1]


def test_a_ledger_that_is_held_or_none_is_named(curate: Curate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    curate(out)
    (out / LEDGER).write_bytes(b"no ledger" * 2000)
    with pytest.raises(InputError, match="is not a ledger"):
        curate(out)


def digests(out: Path) -> dict[str, str]:
    """What must be equal: all but times."""
    skipped = {"begun.json", "run.json", "manifest.json", "work.json", "digests.json", ".lock", LEDGER}
    files = {str(path.relative_to(out)): sha256_file(path) for path in sorted(out.rglob("*"))
             if path.is_file() and path.name not in skipped and ".part" not in path.name}  # fmt: skip
    runs = {path.parent.name: read_json(path)["entry"]["digest"] for path in (out / "runs").glob("*/run.json")}
    return {**files, **runs, "ledger": curation_digest(out / LEDGER)}


def test_a_killed_run_goes_on_to_the_same_digests(
    conf: Path, curate: Curate, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before and after files take their place, at every sixth of them, over two runs."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    curate(whole)
    shutil.copytree(whole, half)
    real, left = os.replace, [10**9]

    def replace(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        real(source, target)
        if left[0] == -1:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)
    arrive(conf)
    curate(whole)
    steps = 10**9 - left[0]
    want = digests(whole)
    assert steps > 20
    for step in range(2, steps, 6):
        out = tmp_path / f"killed{step}"
        shutil.copytree(half, out)
        passes.clear()
        left[0] = step
        with pytest.raises(Killed):
            curate(out)
        left[0] = 10**9
        assert curate(out)["run"] == 2
        assert digests(out) == want, step
        assert sum(passes) <= 8 + 8  # at most a shard twice: the killed one


def test_what_stood_before_the_kill_is_finished_with_its_own_budget(
    curate: Curate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(flow, "record", killed)
        with pytest.raises(Killed):
            curate(out)
    made = curate(out, "budget.documents=3")
    assert (made["run"], made["selected"]) == (2, 3)
    assert ask(out, "SELECT run, selected, published FROM runs ORDER BY run") == [(1, 6, True), (2, 3, True)]


def test_a_run_that_was_killed_behind_its_row_of_the_ledger_is_that_run(
    curate: Curate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(flow, "surroundings", killed)
        with pytest.raises(Killed):
            curate(out)
    assert [*curation_ledger.recorded(out / LEDGER)] == [1]
    assert not (out / "runs" / "0001" / "run.json").exists()
    assert curate(out)["what"] == "nothing is new"
    assert [*curation_ledger.recorded(out / LEDGER)] == [1]
    assert (out / "runs" / "0001" / "run.json").exists()


@pytest.mark.parametrize("settings", [
    (), ("signature.fit.name=median-bit+spread",), ("signature.stored=fp16", "signature.fit.name=center"),
])  # fmt: skip
def test_what_earlier_runs_scored_is_what_a_search_of_everything_says(
    conf: Path, curate: Curate, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """Other queries and back: the third run's scores are of all documents, the first two's of the new ones each."""
    out = tmp_path / "out"
    curate(out, *settings)
    arrive(conf)
    two = curate(out, *settings)
    said = ask(out, "SELECT doc_id, score, n_tokens, query FROM scores ORDER BY doc_id")
    assert len(said) == 44
    other = jsonl(tmp_path / "other.jsonl", [{"text": texts(1, 9)[0]}])
    curate(out, f"queries={other}", *settings)
    again = curate(out, *settings)
    assert ask(out, "SELECT doc_id, score, n_tokens, query FROM scores WHERE run = 4 ORDER BY doc_id") == said
    selected = [pq.read_table(Path(made["published"]) / "selected.parquet") for made in (two, again)]
    assert selected[0].equals(selected[1])
    drifts = [dict(ask(out, f"SELECT what, value FROM drift WHERE run = {run}")) for run in (2, 4)]
    new = {row[0] for row in ask(out, "SELECT doc_id FROM documents WHERE first_run = 2")}
    assert drifts[0]["score new q50"] == pytest.approx(
        float(np.median([score for doc_id, score, *_ in said if doc_id in new])), rel=1e-12)
    assert drifts[1]["score earlier q50"] == pytest.approx(float(np.median([row[1] for row in said])), rel=1e-12)


def test_what_a_run_reads_does_not_grow(
    conf: Path, curate: Curate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files whose bytes a run looks at: as many at the sixteenth run as at the eighth."""
    for name in ("CHECKED", "_SHOWN"):
        monkeypatch.setattr(flow, name, 3)
    out, read, opened = tmp_path / "out", list[int](), list[Path]()
    real = Path.open

    def counted(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", counted)
    for number in range(16):
        arrive(conf, f"{number}.jsonl", seed=100 + number, count=2)
        opened.clear()
        assert curate(out, "budget.documents=2")["run"] == number + 1
        read.append(sum(out in path.parents for path in opened))
    assert max(read[12:]) <= 1.1 * max(read[4:8]), read
    assert min(read) > 20  # it does look


def test_every_run_comes_round() -> None:
    for runs in range(1, 300):
        nights = range(runs, runs + 2 * max(1, 2 * runs // flow.CHECKED) + 1)
        looked = [flow.in_turn(night) for night in nights]
        assert {*range(1, runs + 1)} <= set().union(*looked), runs
        assert all({night} <= some <= {*range(1, night + 1)} for night, some in zip(nights, looked, strict=True))
        assert max(map(len, looked)) <= flow.CHECKED + 1
    assert flow.in_turn(0) == set()


def test_an_earlier_run_that_is_damaged_is_named(conf: Path, curate: Curate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in range(3):
        arrive(conf, f"{number}.jsonl", seed=100 + number, count=2)
        curate(out)
    arrive(conf)
    for file, place in (("intake/files.json", "intake"), ("result/drift.json", "result"), ("run.json", "run.json")):
        for number in (1, 2, 3):
            spoiled = tmp_path / f"{place}{number}"
            shutil.copytree(out, spoiled)
            with (spoiled / "runs" / f"{number:04d}" / file).open("a") as end:
                end.write("x")
            with pytest.raises(InputError, match=rf"runs/{number:04d}/{place}: is damaged"):
                curate(spoiled)


def test_a_bit_that_is_turned_anywhere_in_the_ledger_is_found(curate: Curate, conf: Path, tmp_path: Path) -> None:
    """Also in a block that the run would not read; one that is not in use does no harm."""
    out = tmp_path / "out"
    curate(out)
    arrive(conf)
    content, found = (out / LEDGER).read_bytes(), list[str]()
    for place in range(5000, len(content), len(content) // 40):
        spoiled = bytearray(content)
        spoiled[place] ^= 1
        (out / LEDGER).write_bytes(spoiled)
        try:
            curation_ledger.check_ledger(out / LEDGER)
        except InputError as error:
            found.append(str(error))
        else:
            curation_digest(out / LEDGER)  # all that is in it can be read
    assert found
    assert all("Move it away" in line for line in found)


def test_a_ledger_without_the_scores_of_all_documents_is_named(conf: Path, curate: Curate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    curate(out)
    arrive(conf)
    with duckdb.connect(out / LEDGER) as con:
        con.execute("DELETE FROM scores WHERE doc_id = (SELECT min(doc_id) FROM scores)")
    with pytest.raises(InputError, match=r"has scores of 43 documents, and there are 44; move it away"):
        curate(out)
    (out / LEDGER).unlink()
    assert curate(out)["run"] == 2


def test_a_directory_of_another_version_is_refused(curate: Curate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    curate(out)
    with duckdb.connect(out / LEDGER) as con:
        con.execute("ALTER TABLE scores DROP n_tokens")
    with pytest.raises(InputError, match=r"of another version of this program \(it has no column scores.n_tokens\)"):
        curate(out)
    (out / LEDGER).unlink()
    manifest = out / "runs" / "0001" / "result" / "manifest.json"
    write_json(manifest, {**read_json(manifest), "version": 1}, checked=True)
    with pytest.raises(InputError, match="was made by another version of this program"):
        curate(out)


def test_rows_without_a_usable_document_wait(conf: Path, curate: Curate, tmp_path: Path) -> None:
    shutil.rmtree(conf.parent / "inbox")
    jsonl(conf.parent / "inbox" / "bad.jsonl", [{"text": ""}])
    out = tmp_path / "out"
    first = curate(out)
    assert (first["new"], first["skipped"], first["published"]) == (0, 1, None)
    arrive(conf)
    assert curate(out)["selected"] == 6
    assert pa.array([row[0] for row in ask(out, "SELECT run FROM selections")]).unique().to_pylist() == [2]


def test_the_ledger_opens_in_duckdb_alone(curate: Curate, tmp_path: Path) -> None:
    curate(tmp_path / "out")
    with duckdb.connect(tmp_path / "out" / LEDGER, read_only=True) as con:
        described = {row[0] for row in con.execute("DESCRIBE selections").fetchall()}
    assert described == {"run", "doc_id", "rank", "score", "query"}
