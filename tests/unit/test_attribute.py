"""``rise attribute``: the model's own continuation as the query, and the tokens that made a score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.attribute import attribute, printable
from tasks.common.errors import InputError
from tasks.common.files import read_json
from tasks.common.models import load_causal_lm, load_tokenizer, locate, torch_dtype
from tasks.pool.documents import read_documents, write_documents
from tasks.scoring import explain
from tasks.scoring.build import build_index
from tasks.scoring.config import FitConfig, ScorerConfig, SketchConfig
from tasks.scoring.index import Index
from tests.tiny import tiny_llama

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "quietly")
ALL = 10_000
BELL = "ring\x1b[31m the\nbell \u202e the dog"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pool of 13 documents, one of them a single token, and its index in several types."""
    folder = tmp_path_factory.mktemp("made")
    # With a tied head a random model says its last token again and again.
    model = tiny_llama(folder / "model", tie_word_embeddings=False)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(3, 14))) for _ in range(11)]
    rows = [{"id": f"doc{i:03d}", "text": text} for i, text in enumerate([*texts, BELL, "x"])]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_documents(folder / "pool.parquet", read_documents(folder / "pool.jsonl").table)
    scorer = ScorerConfig(model=str(model), batch_tokens=300, precision="float32", threads=1, max_length=64)
    sketch = SketchConfig(kr=16, kh=6, kg=12, alpha=0.5)
    kinds = (("none", "fp32", None), ("center", "fp32", FitConfig(name="center")), ("bit", "bit", None))
    for name, stored, fit in kinds:
        build_index(folder / "pool.parquet", folder / name, scorer, sketch, stored=stored, fit=fit)  # type: ignore[arg-type]
    third = sketch.model_copy(update={"kg": 0, "km": 40, "lambda_mh": 0.5})
    build_index(folder / "pool.parquet", folder / "third", scorer, third, stored="fp32")
    return folder


def found(made: Path, out: Path, index: str = "none", **given: Any) -> dict[str, Any]:
    """What the command writes as JSON; its table under ``table``."""
    options: dict[str, Any] = {"text": None, "queries": None, "prompt": None, "max_new_tokens": 64, "top": 20,
                               "data": [made / "pool.jsonl"], "tokens": None, "model": None, "calibration": None}
    table = attribute(index=made / index, out=out, **{**options, **given})
    return {**read_json(out), "table": table}


@pytest.mark.parametrize("index", ["none", "third"])
def test_the_shares_of_all_positions_sum_to_the_score(index: str, made: Path, tmp_path: Path) -> None:
    """φ = Σ_t e_t ⊗ ĥ_t / ‖·‖ (Algorithm 2), so φᵀu is a sum over positions; two queries, mean-pooled."""
    (tmp_path / "q.jsonl").write_text('{"text": "seven wizards box"}\n{"text": "the lazy dog jumps"}\n')
    rows = found(made, tmp_path / "o.json", index, queries=tmp_path / "q.jsonl", tokens=ALL)["ranking"]
    assert len(rows) == 13
    whole = Index(made / index)
    lengths = dict(zip(whole.doc_ids, whole.documents["n_tokens"].to_pylist(), strict=True))
    for row in rows:
        shares = [token["share"] for token in row["tokens"]]
        assert len(shares) == lengths[row["doc_id"]] - 1
        assert sum(shares) == pytest.approx(row["score"], abs=1e-5)
        assert shares == sorted(shares, reverse=True)
        assert sorted(token["token"] for token in row["tokens"]) == list(range(1, lengths[row["doc_id"]]))
    assert sum(abs(row["score"]) > 0.01 for row in rows) >= 10  # not a sum of zeros
    assert next(row for row in rows if row["doc_id"] == "doc012")["tokens"] == []


def test_the_third_channel_is_shown_where_the_index_has_it(made: Path, tmp_path: Path) -> None:
    made_of = found(made, tmp_path / "o.json", "third", text="seven wizards box")
    assert made_of["table"].splitlines()[0].split() == ["rank", "score", "RH", "MH", "document"]
    for row in made_of["ranking"]:
        assert row["rh"] + row["mh"] == pytest.approx(row["score"], abs=1e-6)
    assert sum(abs(row["mh"]) > 0.01 for row in made_of["ranking"]) >= 10
    assert "mh" not in found(made, tmp_path / "o.json", text="seven wizards box")["ranking"][0]


def test_a_centred_score_orders_the_positions_as_its_shares(made: Path, tmp_path: Path) -> None:
    """For ``center``: score = (Σ shares − u·m) / ‖φ − m‖, with the shares as they are given."""
    rows = found(made, tmp_path / "o.json", "center", text="seven wizards box", tokens=ALL)["ranking"]
    raw, centred = Index(made / "none"), Index(made / "center").calibration
    phi = dict(zip(raw.doc_ids, raw.signatures(range(len(raw))), strict=True))
    sums = {row["doc_id"]: sum(token["share"] for token in row["tokens"]) for row in rows if row["tokens"]}
    norms = {name: float(np.linalg.norm(phi[name] - centred.mean)) for name in sums}  # type: ignore[union-attr]
    offsets = [sums[row["doc_id"]] - row["score"] * norms[row["doc_id"]] for row in rows if row["tokens"]]
    assert np.ptp(offsets) < 1e-5  # u·m, the same for every document
    assert len(offsets) == 12


def test_the_strongest_tokens_are_shown_in_their_context_and_escaped(made: Path, tmp_path: Path) -> None:
    result = found(made, tmp_path / "o.json", "bit", text=BELL, tokens=3, top=2)
    assert [len(row["tokens"]) for row in result["ranking"]] == [3, 3]
    best = result["ranking"][0]
    assert best["doc_id"] == "doc011"
    ids = BELL.encode()
    for token in best["tokens"]:
        before = ids[max(0, token["token"] - explain.CONTEXT) : token["token"]].decode(errors="replace")
        cut = "… " if token["token"] > explain.CONTEXT else ""
        assert token["context"] == cut + printable(before)
        assert f"{token['share']:+.5f}  {token['context']} predicts →{token['text']}←" in result["table"]
    assert all(sign.isprintable() or sign == "\n" for sign in result["table"])
    assert len(result["table"].splitlines()) == 1 + 2 * (1 + 3)


def test_a_prompt_is_continued_greedily_and_attributed_with_its_continuation(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = found(made, tmp_path / "a.json", prompt="seven wiz", max_new_tokens=9)
    said = capsys.readouterr().err
    found(made, tmp_path / "b.json", prompt="seven wiz", max_new_tokens=9)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert said.count("generated: ") == 1
    assert f"generated: {printable(first['generation'])}\n" in said
    located = locate(str(made / "model"))
    model, tokenizer = load_causal_lm(located, dtype=torch_dtype("float32")), load_tokenizer(located)
    ids = tokenizer("seven wiz", return_tensors="pt")["input_ids"]
    import torch

    for _ in range(9):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert first["generation"] == tokenizer.decode(ids[0, len("seven wiz") :], skip_special_tokens=True)
    assert first["prompt"] == "seven wiz"
    as_text = found(made, tmp_path / "c.json", text="seven wiz" + first["generation"])
    assert as_text["ranking"] == first["ranking"]


def test_a_continuation_ends_where_the_index_stops_reading(made: Path) -> None:
    prompt = ("seven wizards quietly " * 3)[:52]  # of 64 tokens
    assert explain.generate(Index(made / "none"), prompt, 5) != explain.generate(Index(made / "none"), prompt, 64)
    assert explain.generate(Index(made / "none"), prompt, 12) == explain.generate(Index(made / "none"), prompt, 64)


@pytest.mark.parametrize(("given", "expected"), [
    ({"text": "a b", "prompt": "a b"}, "or --prompt"),
    ({}, "or --prompt"),
    ({"prompt": " "}, "--prompt is empty"),
    ({"prompt": "x" * 64}, "--prompt has 64 tokens, and 64 are read"),
    ({"text": "a b", "tokens": 2, "data": []}, "--tokens needs --data"),
    ({"text": "a b", "tokens": 2, "data": "part"}, "is not in --data"),
    ({"text": "a b", "tokens": 2, "data": "changed"}, "in the index and"),
])  # fmt: skip
def test_bad_input_is_named(made: Path, tmp_path: Path, given: dict[str, Any], expected: str) -> None:
    lines = (made / "pool.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(lines[1:]))
    (tmp_path / "changed.jsonl").write_text("".join([json.dumps({"id": "doc000", "text": "short"}) + "\n", *lines[1:]]))
    if isinstance(given.get("data"), str):
        given = {**given, "data": [tmp_path / f"{given['data']}.jsonl"]}
    with pytest.raises(InputError, match=expected):
        found(made, tmp_path / "o.json", **given)
    assert not (tmp_path / "o.json").exists()
