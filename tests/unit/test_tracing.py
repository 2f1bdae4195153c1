"""Fact tracing: ranks and metrics against other definitions, the draw of facts and pools, and where a prompt ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score

from tasks.common.errors import InputError
from tasks.common.files import read_json, sha256_file
from tasks.pool.documents import PROMPT_CHARS, content_id, read_documents, write_documents
from tasks.pool.facts import FactsConfig, build_facts, facts_inputs
from tasks.scoring.batching import Tokenized, read_columns, tokenize
from tasks.scoring.config import LmHeadConfig, ScorerConfig, SketchConfig
from tasks.scoring.engine import forward, read_positions, readout_factors
from tasks.scoring.methods import Request, score_pool
from tasks.scoring.ranks import ranks, write_ranks
from tasks.scoring.readout import Readout
from tasks.scoring.rise import Sketcher
from tasks.scoring.search import Scores
from tasks.selection.tracing import TRACES, TracingConfig, bootstrap_means, fact_values, trace
from tests.golden.heads import VOCAB, build
from tests.tiny import tiny_llama, tiny_tokenizer

# ---- ranks and metrics


def test_ranks_break_ties_by_id() -> None:
    scores_N = np.array([0.5, 2.0, 0.5, -1.0, 2.0, 0.5], dtype=np.float32)
    order_N = np.array([3, 5, 0, 1, 2, 4])
    # by score, then by number: 4 (2.0, 2), 1 (2.0, 5), 2 (.5, 0), 0 (.5, 3), 5 (.5, 4), 3
    assert ranks(scores_N, order_N, np.arange(6)).tolist() == [4, 2, 3, 6, 1, 5]
    random = np.random.default_rng(0)
    scores_N, order_N = random.integers(0, 9, 200).astype(float), random.permutation(200)
    places = np.lexsort((order_N, -scores_N))
    assert ranks(scores_N, order_N, places).tolist() == list(range(1, 201))


def test_the_metrics_by_hand() -> None:
    values = fact_values([[3], [1, 11, 12], [20, 10], [40]], (10, 1))
    np.testing.assert_allclose(values, [
        [1 / 3, 1, 1, 0, 0], [1, 1 / 3, 1, 1 / 3, 1], [1 / 10, 1 / 2, 1, 0, 0], [1 / 40, 0, 0, 0, 0],
    ])  # fmt: skip


def test_the_metrics_are_scikit_learns_where_a_fact_has_one_passage() -> None:
    random = np.random.default_rng(1)
    scores_FN, wanted = random.normal(size=(60, 40)), random.integers(0, 40, 60)
    scores_FN[np.arange(60), wanted] += 0.5
    found = [ranks(row, np.arange(40), np.array([one])).tolist() for row, one in zip(scores_FN, wanted, strict=True)]
    mrr, recall, hits = fact_values(found, (10,)).mean(axis=0)
    truth_FN = np.arange(40) == wanted[:, None]
    np.testing.assert_allclose(mrr, label_ranking_average_precision_score(truth_FN, scores_FN))
    np.testing.assert_allclose([recall, hits], top_k_accuracy_score(wanted, scores_FN, k=10, labels=np.arange(40)))
    assert 0 < mrr < recall < 1


def test_intervals_are_those_of_resampled_facts() -> None:
    random = np.random.default_rng(2)
    values_FM = random.random((30, 2)) ** 2
    low_M, high_M = bootstrap_means(values_FM, resamples=4000, confidence=0.9, seed=3)
    drawn = values_FM[random.integers(0, 30, (4000, 30))].mean(axis=1)
    np.testing.assert_allclose([low_M, high_M], np.quantile(drawn, (0.05, 0.95), axis=0), atol=0.01)
    again = bootstrap_means(values_FM, resamples=4000, confidence=0.9, seed=3)
    assert np.array_equal(again, (low_M, high_M))
    same_M = bootstrap_means(np.full((5, 1), 0.25), resamples=10, confidence=0.5, seed=0)
    assert np.array_equal(same_M, np.full((2, 1), 0.25))


def test_what_is_written_of_all_pairs_is_the_evidences_ranks(tmp_path: Path) -> None:
    per_query = np.array([[0.1, 0.9, 0.5], [0.2, 0.2, 0.2]], dtype=np.float32)
    scores = Scores(["c", "a", "b"], per_query.mean(axis=0, dtype=np.float64), ["f.text", "g.text"], per_query)
    rows = [("f.text", "b"), ("f.text", "c"), ("g.text", "b")]
    pq.write_table(pa.table([list(column) for column in zip(*rows, strict=True)], ["query_id", "doc_id"]),
                   tmp_path / "evidence.parquet")  # fmt: skip
    write_ranks(scores, tmp_path / "evidence.parquet", tmp_path / "ranks.parquet")
    assert pq.read_table(tmp_path / "ranks.parquet")["rank"].to_pylist() == [2, 3, 2]
    without = Scores(["c", "a", "b"], np.array([3.0, -np.inf, 1.0]), [], None)
    write_ranks(without, tmp_path / "evidence.parquet", tmp_path / "blind.parquet")
    assert pq.read_table(tmp_path / "blind.parquet")["rank"].to_pylist() == [2, 1, 2]
    pq.write_table(pa.table({"doc_id": ["g.text", "f.text"], "label": ["text", "text"]}), tmp_path / "queries.parquet")
    assert trace(TracingConfig(ks=(2, 1), resamples=50), tmp_path, tmp_path, tmp_path) == 5
    found = {(row["metric"], row["k"]): row for row in pq.read_table(tmp_path / TRACES).to_pylist()}
    assert {key: row["value"] for key, row in found.items()} == {
        ("mrr", None): 0.5, ("recall", 2): 0.75, ("hits", 2): 1, ("recall", 1): 0, ("hits", 1): 0}  # fmt: skip
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] == 2 for row in found.values())
    assert found["recall", 2]["low"] == 0.5
    scores.query_ids[1] = "h.text"
    with pytest.raises(InputError, match=r"row 3: the query g\.text or the document b was not scored"):
        write_ranks(scores, tmp_path / "evidence.parquet", tmp_path / "ranks.parquet")
    pq.write_table(pa.table({"doc_id": ["i.text"], "label": ["text"]}), tmp_path / "queries.parquet")
    with pytest.raises(InputError, match=r"i\.text has no rank"):
        trace(TracingConfig(), tmp_path, tmp_path, tmp_path)


# ---- facts and pools


def passage(number: int) -> str:
    """Passages that share no 5-gram to speak of."""
    return " ".join(content_id(f"{number}/{word}")[:6] for word in range(20)) + "."


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """60 passages of 20 articles, one of them nearly another, and 8 facts on the first ones; as a configuration."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = {f"p{n:02}": passage(n) for n in range(59)}
    texts["q00"] = texts["p00"].replace(".", " also.")
    rows = [{"key": doc_id, "text": text, "of": f"article {int(doc_id[1:]) // 3}"} for doc_id, text in texts.items()]
    (tmp_path / "passages-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    (tmp_path / "passages-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[30:]))
    facts = [{"prompt": f"The word of {n} is", "answer": passage(n).split()[3], "where": [f"p{n:02}"]}
             for n in range(7)]  # fmt: skip
    facts[0]["where"] = ["q00", "p00"]
    facts[1]["where"] = ["p01", "p09"]
    facts += [{"prompt": "Nobody says", "answer": "this", "where": []}]
    pq.write_table(pa.Table.from_pylist(facts), tmp_path / "facts.parquet")
    return {
        "facts": {"path": str(tmp_path / "facts.parquet"), "fields": {"completion": "answer", "evidence": "where"}},
        "passages": {"path": str(tmp_path / "passages-*.jsonl"), "fields": {"id": "key", "article": "of"}},
        "sizes": [12, 30],
    }  # fmt: skip


def drawn(values: dict[str, Any], out: Path, size: int = 12, seed: int = 42) -> dict[str, list[dict[str, Any]]]:
    assert build_facts(FactsConfig(**values), out, size=size, seed=seed) == size
    return {name: pq.read_table(out / f"{name}.parquet").to_pylist() for name in ("pool", "queries", "evidence")}


def test_pools_hold_all_evidence_and_each_other(sources: dict[str, Any], tmp_path: Path) -> None:
    small, large = drawn(sources, tmp_path / "12"), drawn(sources, tmp_path / "30", 30)
    ids = {row["doc_id"] for row in small["pool"]}
    assert ids < {row["doc_id"] for row in large["pool"]}
    assert small["queries"] == large["queries"]
    assert small["evidence"] == large["evidence"]
    assert [row["doc_id"] for row in large["pool"]] == sorted(row["doc_id"] for row in large["pool"])
    wanted: dict[str, set[str]] = {}
    for row in small["evidence"]:
        wanted.setdefault(row["query_id"], set()).add(row["doc_id"])
    evidence = set().union(*wanted.values())
    assert evidence <= ids
    assert len(evidence) == 8, "p00 and q00 count once, whichever stands for both"
    assert sorted(len(some) for some in wanted.values()) == [1] * 12 + [2, 2]
    others = {row["doc_id"]: row["source"] for row in large["pool"] if row["doc_id"] not in evidence}
    assert len(others) == 22
    assert not set(others.values()) & {"article 0", "article 1", "article 2", "article 3"}
    asked = {row["doc_id"]: row for row in small["queries"]}
    fact = content_id(f"The word of 3 is\n{passage(3).split()[3]}")
    assert wanted[f"{fact}.text"] == wanted[f"{fact}.completion"] == {"p03"}
    assert [asked[f"{fact}.{kind}"]["prompt_chars"] for kind in ("completion", "text")] == [16, 0]
    assert {asked[f"{fact}.{kind}"]["text"] for kind in ("completion", "text")} == {
        f"The word of 3 is {passage(3).split()[3]}"}  # fmt: skip
    assert read_json(tmp_path / "12" / "card.json") == {
        "facts": 7, "facts_without_evidence": 1, "evidence": 8, "distractors": 4, "repeated": 1, "empty": 0,
    }  # fmt: skip


def test_the_draw_is_the_seeds(sources: dict[str, Any], tmp_path: Path) -> None:
    first, again = drawn(sources, tmp_path / "a"), drawn(sources, tmp_path / "b")
    assert all(sha256_file(tmp_path / "a" / name) == sha256_file(tmp_path / "b" / name)
               for name in ("pool.parquet", "queries.parquet", "evidence.parquet"))  # fmt: skip
    assert first == again
    assert first["pool"] != drawn(sources, tmp_path / "c", seed=7)["pool"]
    few = drawn({**sources, "count": 3, "formulations": ["completion"]}, tmp_path / "d")
    assert len(few["queries"]) == 3
    assert {row["doc_id"] for row in few["queries"]} < {row["doc_id"] for row in first["queries"]}
    apart = drawn({**sources, "articles": 1}, tmp_path / "e")
    articles = {row["doc_id"]: row["source"] for row in apart["pool"]}
    assert len({articles[row["doc_id"]] for row in apart["evidence"]}) == 1
    assert set(facts_inputs(FactsConfig(**sources))) == {
        str(tmp_path / name) for name in ("facts.parquet", "passages-0.jsonl", "passages-1.jsonl")}  # fmt: skip


def test_the_same_text_alone_is_a_duplicate_where_asked(sources: dict[str, Any], tmp_path: Path) -> None:
    found = drawn({**sources, "near_duplicate": None}, tmp_path / "out")
    assert len({row["doc_id"] for row in found["evidence"]}) == 9, "p00 and q00 are two"
    cut = drawn({**sources, "passages": {**sources["passages"], "fields": {"id": "key"}}}, tmp_path / "cut", 50)
    assert {row["source"] for row in cut["pool"]} == {None}, "no article is known, so every passage may distract"
    with pytest.raises(InputError, match="no text of it is left"):
        drawn({**sources, "max_words": 5}, tmp_path / "short")


@pytest.mark.parametrize(("change", "said"), [
    ({"count": 9}, "field facts.count: 9 facts are to be drawn, and there are 7"),
    ({"sizes": [5]}, "field facts.sizes: a pool of 5 passages cannot hold the 8"),
    ({"sizes": [60]}, "for the pool of 60"),
    ({"passages": {"path": "none*.jsonl"}}, r"none\*.jsonl: no such file"),
    ({"facts": {"fields": {"evidence": "spans"}}}, "field completion: no such field; there are prompt, answer, where"),
])  # fmt: skip
def test_what_cannot_be_drawn(change: dict[str, Any], said: str, sources: dict[str, Any], tmp_path: Path) -> None:
    values = {**sources, **change}
    values["facts"] = {**sources["facts"], **values["facts"]} if "facts" in change else values["facts"]
    with pytest.raises(InputError, match=said):
        drawn(values, tmp_path / "out", values["sizes"][0])


@pytest.mark.parametrize(("rows", "said"), [
    ([{"prompt": "a", "completion": "b", "evidence": ["p00"]}, {"prompt": "c", "completion": "d", "evidence": ["no"]}],
     "row 2, field evidence: there is no passage with the id no"),
    ([{"prompt": "a", "completion": None, "evidence": ["p00"]}], "row 1, field completion: must be a string"),
    ([{"prompt": " ", "completion": "b", "evidence": ["p00"]}], "row 1, field prompt: must be a string"),
])  # fmt: skip
def test_bad_facts_are_named_by_row(rows: list[Any], said: str, sources: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=said):
        drawn({**sources, "facts": {"path": str(tmp_path / "bad.jsonl")}}, tmp_path / "out")


@pytest.mark.parametrize(("values", "said"), [
    ({"sizes": [10]}, "either a reader"), ({"reader": "squad", "sizes": [10, 5]}, "sizes must rise"),
    ({"reader": "squad", "sizes": [9], "distractors": ["novels"]}, "unknown reader"),
    ({"reader": "squad", "sizes": [9], "facts": {"path": "x"}}, "either a reader"),
    ({"facts": {"path": "x", "dataset": "y"}, "passages": {"path": "x"}, "sizes": [9]}, "exactly one"),
])  # fmt: skip
def test_a_configuration_says_one_thing(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FactsConfig(**values)


@pytest.mark.wheels
def test_questions_find_their_paragraph(tmp_path: Path) -> None:
    config = FactsConfig(reader="squad", count=30, articles=10, sizes=(120,), max_words=60,
                         distractors=("encyclopedia",))  # fmt: skip
    build_facts(config, tmp_path, size=120, seed=1)
    texts = {row["doc_id"]: row["text"] for row in pq.read_table(tmp_path / "pool.parquet").to_pylist()}
    articles = {row["doc_id"]: row["source"] for row in pq.read_table(tmp_path / "pool.parquet").to_pylist()}
    asked = {row["doc_id"]: row for row in pq.read_table(tmp_path / "queries.parquet").to_pylist()}
    evidence = pq.read_table(tmp_path / "evidence.parquet").to_pylist()
    assert len(asked) == len(evidence) == 60
    assert max(len(text.split()) for text in texts.values()) <= 60
    of = {articles[row["doc_id"]] for row in evidence}
    assert len(of) <= 10
    found = {row["doc_id"] for row in evidence}
    assert not of & {article for doc_id, article in articles.items() if doc_id not in found}
    assert None in articles.values(), "the other reader's texts have no article"
    for row in evidence:
        query = asked[row["query_id"]]
        answer = query["text"][query["prompt_chars"] :] if row["query_id"].endswith(".completion") else ""
        assert answer.strip().casefold() in texts[row["doc_id"]].casefold()


# ---- prompts: which positions count


def test_prompts_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "Paris is in", "text": "France"}, {"id": "b", "prompt": "x ", "text": "y"},
            {"id": "c", "text": "alone"}, {"id": "d", "prompt": "", "text": " none"}]  # fmt: skip
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = read_documents(file).table
    assert plain.column_names == ["doc_id", "text", "label", "source"]
    assert plain["text"].to_pylist() == ["France", "y", "alone", " none"]
    read = read_documents(file, prompts=True).table
    assert read["text"].to_pylist() == ["Paris is in France", "x y", "alone", " none"]
    assert read[PROMPT_CHARS].to_pylist() == [11, 2, 0, 0]
    write_documents(tmp_path / "a.parquet", read)
    assert read_columns(tmp_path / "a.parquet") == (["a", "b", "c", "d"], read["text"].to_pylist(), [11, 2, 0, 0])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "same.parquet")
    assert read_documents(tmp_path / "same.parquet", prompts=True).table.equals(read)
    write_documents(tmp_path / "b.parquet", plain)
    assert read_columns(tmp_path / "b.parquet")[2] is None
    file.write_text(json.dumps({"prompt": 7, "text": "x"}))
    with pytest.raises(InputError, match="row 1, field prompt: must be a string, is a number"):
        read_documents(file, prompts=True)
    assert read_documents(file).table["text"].to_pylist() == ["x"]


def test_a_completion_begins_at_the_first_token_that_reaches_into_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path))  # a token a byte
    texts, prompts = ["Grüße an dich", "abc", "all of it"], [5, 1, 0]
    made = tokenize(tokenizer, ["u", "v", "w"], texts, 99, prompts)
    plain = tokenize(tokenizer, ["u", "v", "w"], texts, 99)
    assert made.doc_ids == plain.doc_ids == ("v", "w", "u")
    assert np.array_equal(made.flat, plain.flat)
    assert made.starts.tolist() == [0, 0, 6], "ü and ß are two bytes each: the completion begins at byte 7"
    assert plain.starts.tolist() == [0, 0, 0]
    assert made.digest() != plain.digest()
    assert tokenize(tokenizer, ["u", "v", "w"], texts, 99, [0, 0, 0]).digest() == plain.digest()
    with pytest.raises(InputError, match="the prompt of the document u fills all 7 tokens"):
        tokenize(tokenizer, ["u"], texts[:1], 7, prompts[:1])


def test_only_the_completions_positions_make_a_signature() -> None:
    model, config = build("llama tied"), SketchConfig(kr=16, kh=6, kg=12, max_top=40)
    readout = Readout(model, "llama tied")
    sketcher = Sketcher(readout.head, config)
    random = np.random.default_rng(3)
    tokens = [random.integers(2, VOCAB, n) for n in (9, 5, 14, 5, 2)]
    starts = [4, 0, 12, 3, 0]
    ids = ["a", "b", "c", "d", "e"]
    whole, cut = Tokenized.of(ids, tokens), Tokenized.of(ids, tokens, starts)
    made = forward(readout, cut, range(5), batch_tokens=30, sketchers=[sketcher], losses=True)
    assert made.losses is not None
    for place, doc_id in enumerate(cut.doc_ids):
        first = starts[ids.index(doc_id)]
        with torch.inference_mode():
            alone = read_positions(readout, whole, range(place, place + 1))
            h_Td, label_T = alone.h_Td[first:], alone.label_T[first:]
            factors, loss_T = readout_factors(readout, h_Td, label_T, [sketcher], losses=True)
            expected = sketcher.signatures(factors[0], [len(h_Td)])
        np.testing.assert_allclose(made.signatures[0][place], expected[0].numpy(), atol=1e-5)
        assert loss_T is not None
        np.testing.assert_allclose(made.losses[place], float(loss_T.mean()), rtol=1e-5)
        # What stands before the completion still decides its hidden states.
        if first:
            bare = forward(readout, Tokenized.of(["x"], [cut.ids(place)[first:]]), range(1), batch_tokens=30,
                           sketchers=[sketcher])  # fmt: skip
            assert np.abs(bare.signatures[0] - made.signatures[0][place]).max() > 1e-3
    without = forward(readout, whole, range(5), batch_tokens=30, sketchers=[sketcher])
    same = Tokenized.of(ids, tokens, [0] * 5)
    assert forward(readout, same, range(5), batch_tokens=30, sketchers=[sketcher]).signatures[0].tobytes() == (
        without.signatures[0].tobytes())  # fmt: skip
    assert same.digest() == whole.digest() != cut.digest()


def test_a_rival_that_reads_positions_reads_the_completions(tmp_path: Path) -> None:
    """Queries of one prompt differ by their completions alone; the exact head gradient sees nothing else."""
    model = str(tiny_llama(tmp_path / "model"))
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"text": passage(n)}) + "\n" for n in range(6)))
    write_documents(tmp_path / "pool.parquet", read_documents(tmp_path / "pool.jsonl").table)
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "q", "prompt": passage(3), "text": "yes"}))
    scored = {}
    for prompts in (True, False):
        table = read_documents(tmp_path / "q.jsonl", prompts=prompts).table
        write_documents(tmp_path / "queries.parquet", table)
        request = Request(tmp_path / "pool.parquet", tmp_path / "queries.parquet",
                          ScorerConfig(model=model, precision="float32", max_length=200), tmp_path / f"{prompts}")
        scored[prompts] = score_pool(LmHeadConfig(), request).mean
    assert np.abs(scored[True] - scored[False]).max() > 1e-4


@pytest.mark.parametrize(("name", "sizes"), [("facts", (50, 100, 300)), ("facts-trex", (20_000, 200_000, 1_000_000))])
def test_the_published_configurations_are_whole(name: str, sizes: tuple[int, ...]) -> None:
    from flows.facts_config import load

    config = load(Path(__file__).parents[2] / "conf" / "studies" / f"{name}.yaml")
    assert (config.name, config.facts.sizes, config.ks) == (name, sizes, (10,))
    assert {"rise", "rise-compact", "bm25", "embedding", "random"} <= set(config.methods)
