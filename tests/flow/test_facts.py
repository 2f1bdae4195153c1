"""Fact tracing from the command line, and prompts in `rise score`: whole, again, refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tasks.common.files import read_json
from tests.flow.conftest import REPOSITORY, texts
from tests.tiny import tiny_llama

SKETCH = {"kr": 16, "kh": 6, "kg": 12}


@pytest.fixture(scope="module")
def facts_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 facts among 20 and 40 made-up passages: a fact is two words of its passage, completed by the next ones."""
    folder = tmp_path_factory.mktemp("facts")
    passages = texts(60, 50)
    rows = [{"id": f"p{n:02}", "text": text} for n, text in enumerate(passages)]
    facts = [{"prompt": " ".join(text.split()[:4]), "completion": " ".join(text.split()[4:7]), "evidence": [f"p{n:02}"]}
             for n, text in enumerate(passages[:10])]  # fmt: skip
    for name, some in (("passages", rows), ("facts", facts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    values = {
        "name": "tiny-facts", "resamples": 50, "seeds": [1, 2],
        "scorer": {"model": str(tiny_llama(folder / "scorer")), "precision": "float32", "max_length": 96,
                   "batch_tokens": 512, "shard_tokens": 1024},
        "facts": {"facts": {"path": str(folder / "facts.jsonl")}, "passages": {"path": str(folder / "passages.jsonl")},
                  "sizes": [20, 40]},
        "methods": {"random": {"method": "random"}, "bm25": {"method": "bm25"},
                    "hidden": {"method": "hidden"}, "rise": {"method": "rise", "sketch": SKETCH}},
    }  # fmt: skip
    path = folder / "facts.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def run(server: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "flows.cli", *map(str, arguments)], capture_output=True, text=True,
                          check=False, env=server, cwd=REPOSITORY, timeout=600)  # fmt: skip


@pytest.fixture(scope="module")
def traced(facts_conf: Path, server: dict[str, str]) -> tuple[Path, str, dict[str, str]]:
    """The tiny run, what it printed, and its environment."""
    environment = {**server, "HF_DATASETS_CACHE": str(facts_conf.parent / "cache")}
    done = run(environment, "facts", facts_conf, "--out", facts_conf.parent / "run")
    assert done.returncode == 0, done.stderr
    return facts_conf.parent / "run", done.stdout, environment


def test_every_pool_has_its_figures(traced: tuple[Path, str, dict[str, str]]) -> None:
    directory, printed, _ = traced
    found = read_json(directory / "results.json")
    figures = {(row["pool"], row["method"], row["seed"], row["formulation"], row["metric"]): row
               for row in found["traces"]}  # fmt: skip
    # 2 pools × 3 metrics × (3 arms that compare whole texts + rise with 2 seeds and 2 formulations)
    assert len(figures) == len(found["traces"]) == 2 * 3 * (3 + 4)
    for pool in (20, 40):
        assert figures[pool, "bm25", None, "text", "mrr"]["value"] > 0.9, "a query shares seven words with its passage"
        assert figures[pool, "bm25", None, "text", "recall"]["value"] == 1
        apart = {figures[pool, "rise", seed, kind, "mrr"]["value"]
                 for seed in (1, 2) for kind in ("completion", "text")}  # fmt: skip
        assert len(apart) == 4, "seeds and formulations make a difference"
        kept = pq.read_table(directory / "scoring" / f"{pool}.rise@1" / "ranks.parquet")
        assert len(kept) == 20
        assert not (directory / "scoring" / f"{pool}.rise@1" / "per_query.parquet").exists(), "no score of every pair"
    blind = [figures[pool, "random", None, "text", "mrr"]["value"] for pool in (20, 40)]
    assert blind[0] > blind[1], "a larger pool is harder"
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] == 10 for row in found["traces"])
    costs = {(row["pool"], row["method"], row["seed"]): row for row in found["costs"]}
    assert costs[40, "rise", 1]["bytes_a_document"] == 336
    assert costs[40, "rise", 1]["shared"]
    assert len(costs) == 10
    assert "Recall@10 40" in printed
    assert "Hits@10" not in printed, "a fact has one passage, so it is Recall@10 again"
    assert [line.split()[:2] for line in printed.splitlines()[2:7]] == [
        ["random", "text"], ["bm25", "text"], ["hidden", "text"], ["rise", "completion"], ["rise", "text"]]  # fmt: skip
    assert read_json(directory / "manifest.json")["digest"] in printed


def test_again_recomputes_nothing(facts_conf: Path, traced: tuple[Path, str, dict[str, str]]) -> None:
    directory, printed, environment = traced
    before = {path: path.stat().st_mtime_ns for path in directory.glob("*/*/manifest.json")}
    assert len(before) == 2 * (1 + 1 + 5 + 5)
    done = run(environment, "facts", facts_conf, "--out", directory)
    assert done.stdout == printed
    assert {path: path.stat().st_mtime_ns for path in directory.glob("*/*/manifest.json")} == before
    for setting, said in (("facts.sizes=[70]", "70"), ("facts.facts.path=none", "none"), ("facts.reader=x", "squad")):
        refused = run(environment, "facts", facts_conf, "--out", directory, "--set", setting)
        assert refused.returncode == 2
        assert said in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr


def test_rise_score_reads_the_completion_alone(facts_conf: Path, traced: Any, tmp_path: Path) -> None:
    """Queries with a prompt give the scores that the run gave to completions; joined by hand, those of whole texts."""
    directory, _, environment = traced
    wanted = pq.read_table(directory / "scoring" / "40.rise@1" / "ranks.parquet").to_pylist()
    facts = [json.loads(line) for line in (facts_conf.parent / "facts.jsonl").read_text().splitlines()]
    pool = pq.read_table(directory / "pool" / "40" / "pool.parquet").select(["doc_id", "text"])
    pq.write_table(pool.rename_columns(["id", "text"]), tmp_path / "pool.parquet")
    queries = pq.read_table(directory / "pool" / "40" / "queries.parquet").to_pylist()
    by_text = {row["text"]: row["source"] for row in queries}
    model = yaml.safe_load(facts_conf.read_text())["scorer"]["model"]
    for kind in ("completion", "text"):
        rows = [{"id": by_text[f"{fact['prompt']} {fact['completion']}"],
                 **({"prompt": fact["prompt"], "text": fact["completion"]} if kind == "completion"
                    else {"text": f"{fact['prompt']} {fact['completion']}"})} for fact in facts]  # fmt: skip
        (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = run(environment, "score", "--model", model, "--pool", tmp_path / "pool.parquet", "--queries",
                   tmp_path / "queries.jsonl", "--out", tmp_path / "out.parquet", "--per-query",
                   tmp_path / f"{kind}.parquet", "--kr", 16, "--kh", 6, "--kg", 12, "--seed", 1, "--max-length", 96,
                   "--precision", "float32")  # fmt: skip
        assert done.returncode == 0, done.stderr
        scores = {(row["query_id"], row["doc_id"]): row["score"]
                  for row in pq.read_table(tmp_path / f"{kind}.parquet").to_pylist()}  # fmt: skip
        some = [row for row in wanted if row["query_id"].endswith(f".{kind}")]
        assert len(some) == 10
        np.testing.assert_allclose([row["score"] for row in some],
                                   [scores[row["query_id"].rpartition(".")[0], row["doc_id"]] for row in some],
                                   atol=2e-4)  # fmt: skip
