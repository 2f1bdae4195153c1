"""Indexes, methods and ``rise score`` on a tiny random model."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.common.errors import InputError
from tasks.common.stage import digest_directory
from tasks.scoring import calibration
from tasks.scoring.build import build_index
from tasks.scoring.config import (
    Bm25Config,
    LengthConfig,
    PerplexityConfig,
    RandomConfig,
    RiseConfig,
    ScorerConfig,
    SketchConfig,
)
from tasks.scoring.index import Index
from tasks.scoring.methods import Request, per_query_table, ranked, read_out, score_pool, write_scores
from tasks.scoring.search import Scores
from tests.tiny import tiny_gpt_neox, tiny_llama

SKETCH = SketchConfig(kr=16, kh=6, kg=12)
WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "seven", "wizards", "box"]


def write_documents(path: Path, count: int, seed: int, *, reverse: bool = False) -> Path:
    rng = np.random.default_rng(seed)
    rows = [(f"doc{i:03d}", " ".join(rng.choice(WORDS, rng.integers(3, 14)))) for i in range(count)]
    rows = rows[::-1] if reverse else rows
    pq.write_table(pa.table({"doc_id": [r[0] for r in rows], "text": [r[1] for r in rows]}), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def request_(tmp_path: Path, model: Path) -> Request:
    pool = write_documents(tmp_path / "pool.parquet", 40, 0)
    queries = write_documents(tmp_path / "queries.parquet", 5, 1)
    scorer = ScorerConfig(model=str(model), batch_tokens=300, shard_tokens=500, precision="float32")
    return Request(pool, queries, scorer, tmp_path / "work")


def signatures(directory: Path) -> dict[str, np.ndarray]:
    index = Index(directory)
    return dict(zip(index.doc_ids, np.concatenate(list(index.blocks())), strict=True))


def test_signatures_do_not_depend_on_batches_shards_or_order(tmp_path: Path, model: Path) -> None:
    forth = write_documents(tmp_path / "forth.parquet", 30, 0)
    back = write_documents(tmp_path / "back.parquet", 30, 0, reverse=True)
    plans = [(forth, 300, 500), (back, 300, 500), (forth, 40, 500), (forth, 2000, 100_000), (back, 100, 120)]
    made = []
    for i, (documents, batch_tokens, shard_tokens) in enumerate(plans):
        scorer = ScorerConfig(model=str(model), batch_tokens=batch_tokens, shard_tokens=shard_tokens,
                              precision="float32")  # fmt: skip
        build_index(documents, tmp_path / str(i), scorer, SKETCH, stored="fp32")
        made.append(signatures(tmp_path / str(i)))
    for other in made[1:]:
        assert other.keys() == made[0].keys()
        for doc_id, phi in other.items():
            np.testing.assert_allclose(phi, made[0][doc_id], atol=1e-5)
    assert digest_directory(tmp_path / "0") == digest_directory(tmp_path / "1")  # same plan: byte for byte


def test_two_processes_make_the_same_bytes(tmp_path: Path, model: Path) -> None:
    documents = write_documents(tmp_path / "documents.parquet", 30, 0)
    for processes in (1, 2):
        scorer = ScorerConfig(model=str(model), shard_tokens=300, precision="float32", processes=processes, threads=1)
        build_index(documents, tmp_path / str(processes), scorer, SKETCH, losses=True)
    assert len(Index(tmp_path / "1").manifest["shards"]) > 3
    assert digest_directory(tmp_path / "1") == digest_directory(tmp_path / "2")


def test_an_index_killed_midway_goes_on(tmp_path: Path, model: Path) -> None:
    """SIGKILL after the first shards; the second call makes only the missing ones and ends with the same bytes."""
    documents = write_documents(tmp_path / "documents.parquet", 60, 0)
    scorer = ScorerConfig(model=str(model), shard_tokens=100, batch_tokens=100, precision="float32", threads=1)
    build_index(documents, tmp_path / "alone", scorer, SKETCH)
    code = (
        "from pathlib import Path; import time, tasks.scoring.index as index\n"
        "from tasks.scoring.build import build_index; from tasks.scoring.config import ScorerConfig, SketchConfig\n"
        "write = index.write_shard\n"
        "def slow(*args, **options):\n    write(*args, **options); time.sleep(0.2)\n"
        "index.write_shard = slow\n"
        f"build_index(Path({str(documents)!r}), Path({str(tmp_path / 'killed')!r}), "
        f"ScorerConfig(**{scorer.plain()!r}), SketchConfig(**{SKETCH.plain()!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    shards = tmp_path / "killed" / "shards"
    deadline = time.monotonic() + 60
    while len(list(shards.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    whole = {path: path.stat().st_mtime_ns for path in shards.glob("*.json")}
    assert 3 <= len(whole) < len(Index(tmp_path / "alone").manifest["shards"])
    with pytest.raises(InputError, match="no whole index"):
        len(Index(tmp_path / "killed"))
    build_index(documents, tmp_path / "killed", scorer, SKETCH)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    assert digest_directory(tmp_path / "killed") == digest_directory(tmp_path / "alone")


def test_another_model_or_sketch_is_refused(tmp_path: Path, model: Path) -> None:
    documents = write_documents(tmp_path / "documents.parquet", 5, 0)
    build_index(documents, tmp_path / "index", ScorerConfig(model=str(model)), SKETCH)
    with pytest.raises(InputError, match="made with sketch"):
        build_index(documents, tmp_path / "index", ScorerConfig(model=str(model)), SKETCH.model_copy(update={"kr": 8}))
    other = tiny_gpt_neox(tmp_path / "neox")
    with pytest.raises(InputError, match="made with"):
        build_index(documents, tmp_path / "index", ScorerConfig(model=str(other)), SKETCH)


def test_a_document_beyond_the_models_positions_is_refused(tmp_path: Path, model: Path) -> None:
    documents = tmp_path / "documents.parquet"
    pq.write_table(pa.table({"doc_id": ["short", "long"], "text": ["a b c", "a" * 300]}), documents)
    build_index(documents, tmp_path / "cut", ScorerConfig(model=str(model), max_length=256), SKETCH)
    with pytest.raises(InputError, match="256 positions"):
        build_index(documents, tmp_path / "index", ScorerConfig(model=str(model), max_length=400), SKETCH)


def test_rise_is_the_product_with_the_mean_query(request_: Request) -> None:
    scores = score_pool(RiseConfig(sketch=SKETCH, index_type="fp32"), request_)
    pool, queries = (signatures(request_.work / "readout" / side) for side in ("pool", "queries"))
    mean = np.mean(list(queries.values()), axis=0)
    for doc_id, score in zip(scores.doc_ids, scores.mean, strict=True):
        assert score == pytest.approx(float(pool[doc_id] @ mean), abs=1e-6)
    assert scores.per_query is not None
    np.testing.assert_allclose(scores.per_query.mean(axis=0), scores.mean, atol=1e-6)


@pytest.mark.parametrize("stored", ["fp16", "bit"])
def test_methods_score_from_a_shared_readout_as_from_their_own(request_: Request, tmp_path: Path, stored: str) -> None:
    calibrated = "median-bit" if stored == "bit" else "none"
    sketches = {"one": SKETCH, "two": SKETCH.model_copy(update={"alpha": 1.0, "seed": 3})}
    assert read_out(request_, tmp_path / "shared", sketches=sketches, stored=stored, losses=True) == 40
    assert sorted(path.relative_to(tmp_path / "shared").as_posix() for path in (tmp_path / "shared").glob("*/*")) == [
        "one/pool", "one/queries", "two/pool", "two/queries"]  # fmt: skip
    assert Index(tmp_path / "shared" / "two" / "queries").stored == ("fp32" if stored == "bit" else stored)
    for name, sketch in sketches.items():
        config = RiseConfig(sketch=sketch, index_type=stored, calibration=calibrated)
        ours = score_pool(config, replace(request_, readout=tmp_path / "shared" / name))
        own = score_pool(config, replace(request_, work=tmp_path / name))
        assert ours.doc_ids == own.doc_ids
        np.testing.assert_array_equal(ours.per_query, own.per_query)
        losses = score_pool(PerplexityConfig(), replace(request_, readout=tmp_path / "shared" / name))
        own = score_pool(PerplexityConfig(), request_)
        assert dict(zip(losses.doc_ids, losses.mean, strict=True)) == pytest.approx(
            dict(zip(own.doc_ids, own.mean, strict=True)), rel=1e-5)  # fmt: skip
    assert [path.name for path in request_.work.iterdir()] == ["losses"]


def test_calibrated_rise_never_sees_the_queries_when_fitted(request_: Request, tmp_path: Path) -> None:
    """The calibrated pool side is the same whatever the queries are."""
    read = request_.work / "readout"
    score_pool(RiseConfig(sketch=SKETCH), request_)
    blocks = list(Index(read / "pool").blocks())
    fitted = calibration.fit("power:0.3", blocks)
    phi = np.concatenate(blocks)
    expected = np.sign(phi) * np.abs(phi) ** 0.3
    expected -= expected.mean(axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(fitted.apply(phi), expected, atol=1e-5)
    np.testing.assert_allclose(calibration.fit("none", blocks).apply(phi), phi)


def test_calibration_is_the_same_in_one_block_or_many() -> None:
    phi = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
    phi[7] = 0.0
    whole, parts = calibration.fit("center", [phi]), calibration.fit("center", np.array_split(phi, 7))
    np.testing.assert_allclose(whole.apply(phi), parts.apply(phi), atol=1e-6)
    assert not whole.apply(phi)[7].any()
    assert np.abs(np.delete(phi, 7, 0).mean(0) - whole.mean).max() < 1e-6


def test_perplexity_ranks_by_the_models_loss(request_: Request, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scores = score_pool(PerplexityConfig(), request_)
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    texts = {row["doc_id"]: row["text"] for row in pq.read_table(request_.pool).to_pylist()}
    for doc_id, score in list(zip(scores.doc_ids, scores.mean, strict=True))[::7]:
        ids = tokenizer(texts[doc_id], return_tensors="pt").input_ids
        with torch.no_grad():
            assert -score == pytest.approx(lm(input_ids=ids, labels=ids).loss.item(), rel=1e-4)


def test_length_counts_tokens(request_: Request) -> None:
    scores = score_pool(LengthConfig(), request_)
    texts = {row["doc_id"]: row["text"] for row in pq.read_table(request_.pool).to_pylist()}
    assert {d: int(s) for d, s in zip(scores.doc_ids, scores.mean, strict=True)} == {
        doc_id: len(text.encode()) for doc_id, text in texts.items()
    }


def test_random_depends_on_the_id_and_the_seed_alone(request_: Request) -> None:
    first, again, other = (score_pool(RandomConfig(seed=seed), request_).mean for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).all()
    assert 0.3 < first.mean() < 0.7


def test_bm25_prefers_the_querys_words(tmp_path: Path, request_: Request) -> None:
    pool = tmp_path / "p.parquet"
    texts = ["influence of gradients", "cats and dogs", "gradients, gradients everywhere"]
    pq.write_table(pa.table({"doc_id": ["a", "b", "c"], "text": texts}), pool)
    queries = tmp_path / "q.parquet"
    pq.write_table(pa.table({"doc_id": ["q", "unseen"], "text": ["gradients", "xylophone"]}), queries)
    scores = score_pool(Bm25Config(), Request(pool, queries, request_.scorer, tmp_path))
    assert scores.per_query is not None
    assert scores.per_query[0, 2] > scores.per_query[0, 0] > scores.per_query[0, 1] == 0
    assert not scores.per_query[1].any()
    assert [row["doc_id"] for row in ranked(scores).to_pylist()] == ["c", "a", "b"]


def test_ties_go_to_the_smaller_id() -> None:
    scores = Scores(["b", "c", "a"], np.array([1.0, 2.0, 1.0]), [], None)
    assert ranked(scores).to_pylist() == [
        {"doc_id": "c", "score": 2.0, "rank": 1}, {"doc_id": "a", "score": 1.0, "rank": 2},
        {"doc_id": "b", "score": 1.0, "rank": 3},
    ]  # fmt: skip


def test_a_score_that_is_no_number_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="1 documents have no finite score"):
        write_scores(Scores(["a"], np.array([np.nan]), [], None), tmp_path / "out.parquet")
    assert not list(tmp_path.iterdir())


def test_scores_per_query_are_all_pairs() -> None:
    table = per_query_table(Scores(["b", "a"], np.zeros(2), ["y", "x"], np.array([[1.0, 2.0], [3.0, 4.0]])))
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("x", "a", 4.0), ("x", "b", 3.0), ("y", "a", 2.0), ("y", "b", 1.0)]  # fmt: skip


def rise(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for name, count in (("pool", 12), ("queries", 3)):
        rows = [{"id": f"{name}{i}", "text": " ".join(rng.choice(WORDS, 8))} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rise_score_writes_the_contracts_columns(files: Path, model: Path, tmp_path: Path) -> None:
    done = rise("score", "--model", model, "--pool", files / "pool.jsonl", "--queries", files / "queries.jsonl",
                "--out", tmp_path / "o.parquet", "--per-query", tmp_path / "q.parquet", "--max-length", 64,
                "--calibration", "power:0.3", "--alpha", 1, "--kr", 8, "--kh", 4, "--kg", 8)  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "o.parquet")
    assert table.column_names == ["doc_id", "score", "rank"]
    assert table["rank"].to_pylist() == list(range(1, 13))
    assert table["score"].to_pylist() == sorted(table["score"].to_pylist(), reverse=True)
    pairs = pq.read_table(tmp_path / "q.parquet")
    assert pairs.column_names == ["query_id", "doc_id", "score"]
    assert len(pairs) == 36
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.parquet", "q.parquet"]


BAD = {
    "missing file": ({}, ["--pool", "none.jsonl"], "none.jsonl: no such file"),
    "broken line": ({"p.jsonl": '{"text": "a"}\n{"text": \n'}, ["--pool", "p.jsonl"], "p.jsonl, row 2"),
    "missing text": ({"p.jsonl": '{"id": "a"}\n'}, ["--pool", "p.jsonl"], "p.jsonl, row 1, field text"),
    "empty text": ({"p.jsonl": '{"text": "  "}\n'}, ["--pool", "p.jsonl"], "p.jsonl, row 1, field text"),
    "no text": ({"p.jsonl": '{"text": 3}\n'}, ["--pool", "p.jsonl"], "p.jsonl, row 1, field text"),
    "surrogate": ({"p.jsonl": '{"text": "a"}\n{"text": "\\ud800"}\n'}, ["--pool", "p.jsonl"],
                  "p.jsonl, row 2, field text"),
    "too long": ({"p.jsonl": json.dumps({"text": "a " * 5_000_000})}, ["--pool", "p.jsonl"],
                 "p.jsonl, row 1, field text"),
    "same id": ({"p.jsonl": '{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n'}, ["--pool", "p.jsonl"],
                "p.jsonl, row 2, field id"),
    "no query": ({"q.jsonl": ""}, ["--queries", "q.jsonl"], "q.jsonl"),
    "no model": ({}, ["--model", "./none"], "./none: no such model directory"),
    "no option": ({}, ["--kr", "0"], "field sketch.kr"),
    "no number": ({}, ["--kr", "x"], "--kr"),
    "no method": ({}, ["--method", "x"], "--method"),
    "no calibration": ({}, ["--calibration", "power:2"], "field calibration"),
    "unknown option": ({}, ["--nonsense"], "--nonsense"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2(name: str, files: Path, model: Path, tmp_path: Path) -> None:
    contents, options, expected = BAD[name]
    for file, content in contents.items():
        (tmp_path / file).write_text(content)
    given = {"--model": str(model), "--pool": str(files / "pool.jsonl"), "--queries": str(files / "queries.jsonl"),
             "--out": str(tmp_path / "out.parquet")}  # fmt: skip
    flags = [option for option in options if option == "--nonsense"]
    values = [option for option in options if option not in flags]
    given |= dict(zip(values[::2], values[1::2], strict=True))
    command = [sys.executable, "-m", "flows.cli", "score", *flags, *(part for pair in given.items() for part in pair)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert expected in done.stderr
    assert not (tmp_path / "out.parquet").exists()


def test_a_model_without_a_head_is_refused(files: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    from tests.tiny import tiny_tokenizer

    config = BertConfig(vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32)  # fmt: skip
    BertModel(config).save_pretrained(tiny_tokenizer(tmp_path))
    done = rise("score", "--model", tmp_path, "--pool", files / "pool.jsonl", "--queries", files / "queries.jsonl",
                "--out", tmp_path / "o.parquet")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"rise: {tmp_path}")


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(files: Path, model: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: writes fail with the same kind of error."""
    command = [sys.executable, "-m", "flows.cli", "score", "--model", str(model), "--pool", str(files / "pool.jsonl"),
               "--queries", str(files / "queries.jsonl"), "--out", str(tmp_path / "o.parquet")]  # fmt: skip

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, preexec_fn=small_files)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"rise: {tmp_path}/.o.parquet.")
    assert "cannot be written" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o.parquet").exists()
    assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["o.parquet"]
