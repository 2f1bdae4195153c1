"""The ledger: its tables, its statistics in SQL against scikit-learn, and that it is whole or absent."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from tasks.common.errors import InputError
from tasks.common.stage import Ref
from tasks.selection.config import SelectionConfig
from tasks.selection.ledger import TABLES, ArmFiles, ledger_digest, open_ledger, rows, scalar, write_ledger
from tasks.selection.select import oracle, select

SOURCES = {"control": ("wikipedia", "news articles", "editorials"), "junk": ("tweets", "spam mail", "SMS", "chat")}
SKILL = {"random": 0.0, "length": 0.5, "perplexity": 1.1, "bm25": 1.9, "embedding": 1.3, "rise": 2.6}
"""How far apart an arm's synthetic scores put the two labels, in standard deviations."""
PERPLEXITY = {
    "base": (68.3, 303.8), "random": (55.1, 157.6), "length": (54.0, 160.9), "perplexity": (53.2, 171.5),
    "bm25": (49.8, 186.0), "embedding": (52.3, 166.6), "rise": (49.0, 188.9), "oracle": (47.8, 201.6),
}
"""An arm's synthetic perplexity on held-out control and junk."""
WORDS = ["the", "model", "reads", "a", "page", "of", "text", "and", "learns", "from", "it", "what", "follows"]


def document(label: str, number: int, random: np.random.Generator) -> str:
    length = int(np.clip(random.lognormal(3.6 if label == "control" else 3.2, 0.6), 4, 220))
    text = f"{number} " + " ".join(random.choice(WORDS, length))
    return text + " https://example.org/x" if label == "junk" and number % 2 else text


def write_documents(path: Path, labels: list[str], first: int, random: np.random.Generator, hostile: str) -> Path:
    texts = [document(label, first + i, random) for i, label in enumerate(labels)]
    sources = [SOURCES[label][i % len(SOURCES[label])] for i, label in enumerate(labels)]
    if hostile:
        texts[:2] = [f"{texts[0]} {hostile}", hostile]
        sources[:2] = [hostile, hostile]
    table = {"doc_id": [f"{first + i:06x}" for i in range(len(labels))], "text": texts, "label": labels,
             "source": sources}  # fmt: skip
    pq.write_table(pa.table(table), path)
    return path


def build_study(
    folder: Path, *, size: int = 120, hostile: str = "", config: SelectionConfig | None = None, scale: float = 1.0
) -> dict[str, Any]:
    """Files of a synthetic closed loop of eight arms, and the arguments of ``write_ledger`` made from them.

    Args:
        hostile: text to put into documents, sources and an arm's name.
        scale: what all seconds are multiplied with (times differ from run to run, and nothing else does).
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config or SelectionConfig(resamples=40)
    random = np.random.default_rng(7)
    labels = ["control" if i % 10 < 1 else "junk" for i in range(size)]
    held = ["control", "junk"] * 15
    documents = {
        "pool": write_documents(folder / "pool.parquet", labels, 0, random, hostile),
        "queries": write_documents(folder / "queries.parquet", ["control"] * 10, 10_000_000, random, ""),
        "heldout": write_documents(folder / "heldout.parquet", held, 12_000_000, random, ""),
    }
    pool = pq.read_table(documents["pool"])
    tokens = folder / "tokens.parquet"
    counts = [len(text.split()) * 4 // 3 for text in pool["text"].to_pylist()]
    pq.write_table(pa.table({"doc_id": pool["doc_id"], "n_tokens": counts}), tokens)

    arms: dict[str, ArmFiles] = {}
    stages = [Ref("pool", "", str(folder), "0" * 64, size, "k" * 64, 41.5 * scale)]
    for arm, perplexity in PERPLEXITY.items():
        place = folder / arm
        place.mkdir(exist_ok=True)
        name = f"{arm}{hostile}" if hostile and arm == "rise" else arm
        files = ArmFiles(metrics=write_metrics(place / "metrics.parquet", arm, perplexity))
        if arm in SKILL:
            score = random.normal(size=size) + SKILL[arm] * (np.array(labels) == "control")
            score = np.round(score, 1) if arm == "bm25" else np.exp(score) if arm == "length" else score
            pq.write_table(pa.table({"doc_id": pool["doc_id"], "score": score}), place / "scores.parquet")
            select(config, place / "scores.parquet", documents["pool"], place)
            files = replace(files, scores=place / "scores.parquet", selected=place / "selected.parquet")
            stages.append(Ref("scoring", name, str(place), "1" * 64, size, "s" * 64, 63.25 * scale, arm == "bm25"))
        if arm == "oracle":
            oracle(config, documents["pool"], place)
            files = replace(files, selected=place / "selected.parquet")
        if arm != "base":
            files = replace(files, history=write_history(place / "history.parquet", perplexity[0], random))
            stages.append(Ref("pretraining", name, str(place), "2" * 64, 60, "p" * 64, 88.1 * scale))
        stages.append(Ref("evaluation", name, str(place), "3" * 64, 4, "e" * 64, 20.4 * scale))
        arms[name] = files
    return {"config": config, "documents": documents, "tokens": tokens, "arms": arms, "stages": stages}


def write_metrics(path: Path, arm: str, perplexity: tuple[float, float]) -> Path:
    place = list(PERPLEXITY).index(arm)
    values = [
        ("perplexity_control", perplexity[0], None, perplexity[0] * 0.94, perplexity[0] * 1.065, 100),
        ("perplexity_junk", perplexity[1], None, perplexity[1] * 0.9, perplexity[1] * 1.12, 100),
        ("ruler_cwe", 0.012 + 0.003 * place, 0.004, 0.004 + 0.003 * place, 0.020 + 0.003 * place, 50),
        ("arc_challenge_acc_norm", 0.262 + 0.002 * place, 0.013, 0.237 + 0.002 * place, 0.287 + 0.002 * place, 1172),
    ]
    schema = pa.schema([("metric", pa.string()), ("value", pa.float64()), ("stderr", pa.float64()),
                        ("low", pa.float64()), ("high", pa.float64()), ("n", pa.int32())])  # fmt: skip
    pq.write_table(pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in values], schema), path)
    return path


def write_history(path: Path, final: float, random: np.random.Generator) -> Path:
    steps = np.arange(1, 61)
    loss = np.log(final) - 0.35 + 0.9 * np.exp(-steps / 12) + random.normal(0, 0.04, 60)
    pq.write_table(
        pa.table({"step": steps, "epoch": steps / 60, "tokens": steps * 900, "loss": loss,
                  "lr": 2.5e-5 * (1 + np.cos(np.pi * steps / 60))}), path,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return build_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def ledger(study: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ledger") / "study.duckdb"
    write_ledger(path, **study)
    return path


def test_has_the_tables_and_columns_of_the_contract(ledger: Path) -> None:
    contract = {
        "documents": ["doc_id", "text", "label", "source", "n_tokens"],
        "scores": ["method", "doc_id", "score", "rank"],
        "selections": ["method", "doc_id", "rank"],
        "purity": ["method", "k", "purity", "auprc", "auroc"],
        "training": ["method", "step", "loss", "lr"],
        "evaluations": ["method", "metric", "value", "stderr", "n"],
        "stages": ["stage", "method", "seconds", "cached", "digest"],
    }
    with open_ledger(ledger) as con:
        for table, columns in contract.items():
            names = [name for (name, *_) in con.execute(f"DESCRIBE {table}").fetchall()]
            assert names[: len(columns)] == columns


def test_holds_every_row_of_the_files(ledger: Path, study: dict[str, Any]) -> None:
    with open_ledger(ledger) as con:
        counts = {table: scalar(con, f"SELECT count(*) FROM {table}") for table in TABLES}
        assert counts["documents"] == 120 + 10 + 30
        assert counts["scores"] == 6 * 120
        assert counts["selections"] == 7 * 12
        assert counts["training"] == 7 * 60
        assert counts["evaluations"] == 8 * 4
        assert counts["stages"] == len(study["stages"])
        assert scalar(con, "SELECT count(n_tokens) FROM documents WHERE split = 'pool'") == 120
        found = rows(con, "SELECT * FROM evaluations WHERE method = 'rise' AND metric = 'perplexity_control'")
        assert [(row["value"], row["stderr"], row["n"]) for row in found] == [(49.0, None, 100)]
        order = "row_number() OVER (PARTITION BY method ORDER BY score DESC, doc_id)"
        assert scalar(con, f"SELECT bool_and(rank = place) FROM (SELECT *, {order} AS place FROM scores)")


def test_sql_statistics_equal_scikit_learn(ledger: Path, study: dict[str, Any]) -> None:
    pool = pq.read_table(study["documents"]["pool"])
    labels = dict(zip(pool["doc_id"].to_pylist(), pool["label"].to_pylist(), strict=True))
    checked = 0
    with open_ledger(ledger) as con:
        for method in SKILL:
            table = pq.read_table(study["arms"][method].scores)
            scores = np.array(table["score"].to_pylist())
            ids = table["doc_id"].to_pylist()
            truth = np.array([labels[doc_id] == "control" for doc_id in ids])
            order = sorted(range(len(ids)), key=lambda i: (-scores[i], ids[i]))
            for row in rows(con, "SELECT * FROM purity WHERE method = ?", [method]):
                assert row["auprc"] == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
                assert row["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
                assert row["purity"] == pytest.approx(truth[order[: row["k"]]].mean(), abs=1e-12)
                assert row["hits"] == truth[order[: row["k"]]].sum()
                assert (row["n"], row["positives"], row["label"]) == (120, 12, "control")
                assert row["purity_low"] <= row["purity"] <= row["purity_high"]
                assert row["auroc_low"] < row["auroc_high"]
                checked += 1
        assert scalar(con, "SELECT count(DISTINCT score) FROM scores WHERE method = 'bm25'") < 60, "ties are tested"
    assert checked == len(SKILL) * len(SelectionConfig().cuts(120))


def test_the_oracle_has_a_purity_and_no_curve(ledger: Path) -> None:
    with open_ledger(ledger) as con:
        (row,) = rows(con, "SELECT * FROM purity WHERE method = 'oracle'")
        assert scalar(con, "SELECT count(*) FROM purity WHERE method = 'base'") == 0
    assert (row["k"], row["purity"], row["hits"]) == (12, 1.0, 12)
    assert row["auprc"] is row["auroc"] is row["purity_low"] is None


def test_shortcuts_rank_the_pool_without_a_model(ledger: Path, study: dict[str, Any]) -> None:
    pool = pq.read_table(study["documents"]["pool"]).to_pylist()
    longest = sorted(pool, key=lambda row: (-len(row["text"]), row["doc_id"]))[:12]
    with open_ledger(ledger) as con:
        found = {row["shortcut"]: row for row in rows(con, "SELECT * FROM shortcuts")}
    truth = [row["label"] == "control" for row in pool]
    assert found["longest first"]["purity"] == np.mean([row["label"] == "control" for row in longest])
    assert found["longest first"]["auroc"] == pytest.approx(roc_auc_score(truth, [len(row["text"]) for row in pool]))
    links = [-row["text"].count("https://") for row in pool]
    assert found["fewest URLs first"]["auprc"] == pytest.approx(average_precision_score(truth, links))


def test_a_pool_without_labels_has_no_statistics_and_no_error(tmp_path: Path) -> None:
    study = build_study(tmp_path / "files")
    pool = pq.read_table(study["documents"]["pool"])
    place = pool.column_names.index("label")
    pq.write_table(pool.set_column(place, "label", pa.nulls(pool.num_rows, pa.string())), study["documents"]["pool"])
    write_ledger(tmp_path / "study.duckdb", **study)
    with open_ledger(tmp_path / "study.duckdb") as con:
        for row in rows(con, "SELECT * FROM purity"):
            assert (row["purity"], row["auprc"], row["auroc"], row["purity_low"]) == (None, None, None, None)
            assert (row["hits"], row["n"], row["positives"]) == (0, 0, 0)


def test_the_digest_is_that_of_the_contents(tmp_path: Path, ledger: Path) -> None:
    digest = ledger_digest(ledger)
    write_ledger(tmp_path / "again.duckdb", **build_study(tmp_path / "elsewhere", scale=3.0))
    assert ledger_digest(tmp_path / "again.duckdb") == digest, "seconds and paths are no contents"
    other = build_study(tmp_path / "third", config=SelectionConfig(k=11, resamples=40))
    write_ledger(tmp_path / "other.duckdb", **other)
    assert ledger_digest(tmp_path / "other.duckdb") != digest


def test_an_error_midway_leaves_the_old_ledger_and_nothing_beside_it(tmp_path: Path) -> None:
    study = build_study(tmp_path / "files")
    path = tmp_path / "run" / "study.duckdb"
    write_ledger(path, **study)
    before = path.read_bytes()
    last = study["arms"]["rise"]
    pq.write_table(pa.table({"doc_id": ["000000"], "score": [float("nan")]}), last.scores)
    with pytest.raises(InputError, match="the score of document '000000' is nan"):
        write_ledger(path, **study)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["study.duckdb"]


def test_a_cut_larger_than_the_pool_is_refused(tmp_path: Path, study: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"selection\.purity_at: 121 documents are wanted, and the pool has 120"):
        write_ledger(tmp_path / "study.duckdb", **{**study, "config": SelectionConfig(purity_at=(121,))})
    assert not list(tmp_path.iterdir())


def test_a_ledger_held_by_another_process_gives_one_line(tmp_path: Path, study: dict[str, Any]) -> None:
    path = tmp_path / "study.duckdb"
    write_ledger(path, **study)
    hold = "import duckdb, sys; con = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=r"study\.duckdb: another process holds the ledger"), open_ledger(path):
            pass
    finally:
        holder.communicate(b"", timeout=30)
    with open_ledger(path) as con, pytest.raises(duckdb.Error, match="read-only"):
        con.execute("DELETE FROM scores")


def test_what_is_no_ledger_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such ledger"), open_ledger(tmp_path / "none.duckdb"):
        pass
    text = tmp_path / "text.duckdb"
    text.write_text("no database at all " * 1000)
    with pytest.raises(InputError, match="is not a ledger: DuckDB cannot read it"), open_ledger(text):
        pass
    duckdb.connect(tmp_path / "empty.duckdb").close()
    with pytest.raises(InputError, match="has no table 'documents'"), open_ledger(tmp_path / "empty.duckdb"):
        pass
