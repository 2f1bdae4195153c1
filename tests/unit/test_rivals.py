"""Rivals that need one forward pass, the calibration they share with RISE, and ``rise score --option``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flows import cli
from tasks.common.config import parse
from tasks.common.errors import InputError
from tasks.common.files import read_json
from tasks.scoring.config import (
    METHODS,
    EmbeddingConfig,
    HiddenConfig,
    LmHeadConfig,
    MethodConfig,
    RiseConfig,
    ScorerConfig,
    SketchConfig,
)
from tasks.scoring.index import Index
from tasks.scoring.methods import Request, score_pool
from tasks.scoring.readout import Readout
from tasks.scoring.rivals import hidden, reading, similarity
from tasks.scoring.rivals.similarity import cosine_scores, kept
from tasks.scoring.search import Scores
from tests.tiny import tiny_encoder, tiny_gpt_neox, tiny_llama

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "seven", "wizards", "box"]
SKETCH = SketchConfig(kr=16, kh=6, kg=12, max_top=40)
SCORED: dict[str, MethodConfig] = {
    "hidden embedding": HiddenConfig(layer="embedding"), "hidden 1": HiddenConfig(layer=1),
    "hidden last": HiddenConfig(calibration="center"),
    **{f"lm-head {variant}": LmHeadConfig(variant=variant, sketch=SKETCH, width=512)
       for variant in ("exact", "sparse", "sparse-sketch", "gradient-sketch")},
    "lm-head product": LmHeadConfig(normalize=False),
}  # fmt: skip


def write_documents(path: Path, count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    texts = ["x", *(" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(count - 1))]
    pq.write_table(pa.table({"doc_id": [f"{path.stem}{i:02d}" for i in range(count)], "text": texts}), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def request_(tmp_path: Path, model: Path) -> Request:
    scorer = ScorerConfig(model=str(model), batch_tokens=300, shard_tokens=400, precision="float32")
    return Request(write_documents(tmp_path / "pool.parquet", 30, 0),
                   write_documents(tmp_path / "queries.parquet", 4, 1), scorer, tmp_path / "work")  # fmt: skip


def by_id(scores: Scores) -> np.ndarray:
    """(Q, N) with queries and documents by id."""
    assert scores.per_query is not None
    assert scores.per_query.shape == (len(scores.query_ids), len(scores.doc_ids))
    np.testing.assert_allclose(scores.mean, scores.per_query.mean(axis=0), rtol=1e-5, atol=1e-6)
    rows, columns = np.argsort(scores.query_ids), np.argsort(scores.doc_ids)
    return scores.per_query[np.ix_(rows, columns)]


def cosine(pool: np.ndarray, queries: np.ndarray, taken_off: np.ndarray | float = 0.0) -> np.ndarray:
    """Cosines (Q, N) in float64 of unit features with something taken off both sides."""
    sides = []
    for features in (queries, pool):
        unit = features / np.linalg.norm(features, axis=1, keepdims=True) - taken_off
        sides.append(unit / np.linalg.norm(unit, axis=1, keepdims=True))
    return sides[0] @ sides[1].T


# Similarity


@pytest.fixture
def features() -> tuple[np.ndarray, np.ndarray]:
    """Features with a large common component, as real ones have."""
    rng = np.random.default_rng(0)
    pool, queries = (rng.normal(size=(count, 20)) * rng.uniform(0.5, 2.0, (count, 1)) + 2.0 for count in (40, 5))
    return pool, queries


def test_plain_is_the_cosine_and_centred_takes_the_pools_mean_off(features: tuple[np.ndarray, np.ndarray]) -> None:
    pool, queries = features
    unit = pool / np.linalg.norm(pool, axis=1, keepdims=True)
    np.testing.assert_allclose(cosine_scores(pool, queries, "none"), cosine(pool, queries), atol=1e-6)
    centred = cosine_scores(pool, queries, "center")
    np.testing.assert_allclose(centred, cosine(pool, queries, unit.mean(axis=0)), atol=1e-5)
    assert centred.dtype == np.float32
    assert cosine(pool, queries).mean() > 0.6
    assert abs(centred.mean()) < 0.1


def test_median_bit_is_the_share_of_equal_signs(features: tuple[np.ndarray, np.ndarray]) -> None:
    pool, queries = features
    above = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in features]
    above = [x > np.median(above[0], axis=0) for x in above]
    agree = (above[1][:, None, :] == above[0][None]).mean(axis=-1)
    np.testing.assert_allclose(cosine_scores(pool, queries, "median-bit"), 2 * agree - 1, atol=1e-6)


@pytest.mark.parametrize("calibration", ["none", "center", "power:0.3", "median-bit"])
def test_one_array_or_several_read_in_blocks_or_whole_are_the_same(
    calibration: str, features: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, queries = features
    pool[7] = 0.0
    whole = cosine_scores(pool, queries, calibration)
    assert not whole[:, 7].any()
    monkeypatch.setattr(similarity, "_BLOCK_BYTES", 3 * 4 * pool.shape[1])
    np.testing.assert_allclose(cosine_scores(np.array_split(pool, 7), queries, calibration), whole, atol=1e-6)


def test_a_sample_is_spread_over_all_parts() -> None:
    parts = np.array_split(np.eye(50, dtype=np.float32), 3)
    places = similarity._evenly(parts, 10)
    assert places.tolist() == [0, 5, 10, 16, 21, 27, 32, 38, 43, 49]
    assert np.concatenate(list(similarity._some(parts, places))).argmax(axis=1).tolist() == places.tolist()
    assert len(similarity._evenly(parts, 99)) == 50


def test_features_are_made_once_and_only_what_is_missing(tmp_path: Path) -> None:
    plan = [(range(0, 3), 3), (range(3, 5), 2)]
    made: list[range] = []

    def make(places: range, count: Callable[[int], None]) -> np.ndarray:
        made.append(places)
        return np.array([[place] for place in places], dtype=np.float16)

    for _ in range(2):
        parts = kept(tmp_path / "f", {"layer": 1}, plan, make, label="f", unit="rows")
        assert np.concatenate(parts).ravel().tolist() == [0, 1, 2, 3, 4]
    assert made == [range(0, 3), range(3, 5)]
    (tmp_path / "f" / "00001.npy").unlink()
    kept(tmp_path / "f", {"layer": 1}, plan, make, label="f", unit="rows")
    assert made[2:] == [range(3, 5)]
    with pytest.raises(InputError, match="layer = 1, not 2"):
        kept(tmp_path / "f", {"layer": 2}, plan, make, label="f", unit="rows")


# Embedding


def test_embeddings_plain_and_centred(tmp_path: Path, request_: Request) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = tiny_encoder(tmp_path / "encoder")
    sides = [pq.read_table(file).to_pydict() for file in (request_.pool, request_.queries)]
    pool, queries = (SentenceTransformer(str(encoder)).encode(side["text"]).astype(np.float64) for side in sides)
    mean = (pool / np.linalg.norm(pool, axis=1, keepdims=True)).mean(axis=0)
    for calibration, expected in (("none", cosine(pool, queries)), ("center", cosine(pool, queries, mean))):
        config = EmbeddingConfig(model=str(encoder), calibration=calibration, batch_size=4)
        np.testing.assert_allclose(by_id(score_pool(config, request_)), expected, atol=2e-5)
    stored = np.load(next((request_.work / "embedding" / "pool").glob("*.npy")))
    assert stored.shape == (30, 32)
    assert stored.dtype == np.float32


# Hidden states


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt_neox])
def test_states_are_those_that_transformers_returns(make: Callable[[Path], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(make(tmp_path / "lm")).eval()
    ids_BT = torch.tensor([[5, 9, 40, 7], [8, 8, 3, 2]])
    with torch.no_grad():
        expected = lm(input_ids=ids_BT, output_hidden_states=True).hidden_states
    readout = Readout(lm, "tiny")
    for layer, place in (("embedding", 0), (1, 1), ("last", 2)):
        torch.testing.assert_close(hidden.states(readout, ids_BT, layer), expected[place])
    before_norm = hidden.states(readout, ids_BT, 2)
    assert not torch.allclose(before_norm, expected[2], atol=1e-3)
    norm = getattr(lm.base_model, "norm", None) or lm.base_model.final_layer_norm
    with torch.no_grad():
        torch.testing.assert_close(norm(before_norm), expected[2])
    with pytest.raises(InputError, match="tiny, field layer: layer 3: the model has layers 1 to 2"):
        hidden.states(readout, ids_BT, 3)


@pytest.mark.parametrize("layer", ["embedding", 1, "last"])
def test_hidden_is_the_cosine_of_token_means(layer: Any, request_: Request, model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    sides = []
    for file in (request_.pool, request_.queries):
        ids = [tokenizer(text, return_tensors="pt").input_ids for text in pq.read_table(file)["text"].to_pylist()]
        with torch.no_grad():
            states = [lm(input_ids=x, output_hidden_states=True).hidden_states for x in ids]
        place = {"embedding": 0, 1: 1, "last": 2}[layer]
        sides.append(np.stack([state[place][0].double().mean(0).numpy() for state in states]))
    np.testing.assert_allclose(by_id(score_pool(HiddenConfig(layer=layer), request_)), cosine(*sides), atol=1e-5)
    unit = sides[0] / np.linalg.norm(sides[0], axis=1, keepdims=True)
    centred = by_id(score_pool(HiddenConfig(layer=layer, calibration="center"), request_))
    np.testing.assert_allclose(centred, cosine(*sides, unit.mean(axis=0)), atol=2e-5)


def test_another_calibration_reads_the_model_no_more(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = by_id(score_pool(HiddenConfig(), request_))
    files = sorted((request_.work / "hidden-last" / "pool").glob("*.npy"))
    assert len(files) > 1
    monkeypatch.setattr(reading, "load_causal_lm", lambda *_, **__: pytest.fail("the model is loaded again"))
    assert (by_id(score_pool(HiddenConfig(), request_)) == plain).all()
    assert not np.allclose(by_id(score_pool(HiddenConfig(calibration="center"), request_)), plain, atol=0.01)


# All methods


@pytest.mark.parametrize("name", SCORED)
def test_scores_do_not_depend_on_batches_and_shards(name: str, request_: Request) -> None:
    made = []
    for number, (batch_tokens, shard_tokens) in enumerate([(300, 400), (1, 100_000), (2000, 90)]):
        scorer = request_.scorer.model_copy(update={"batch_tokens": batch_tokens, "shard_tokens": shard_tokens})
        scores = score_pool(SCORED[name], replace(request_, scorer=scorer, work=request_.work / str(number)))
        made.append(by_id(scores))
    size = np.abs(made[0]).max()
    assert made[0].shape == (4, 30)
    assert np.unique(made[0]).size > 30
    for other in made[1:]:
        np.testing.assert_allclose(other / size, made[0] / size, atol=1e-5 if "sketch" not in name else 1e-4)
    if name != "lm-head product":
        assert size <= 1 + 1e-4


# The LM head


def test_products_are_cosines_times_norms(request_: Request) -> None:
    """Of the queries against themselves: the product's diagonal holds the squared norms."""
    same = replace(request_, pool=request_.queries)
    product = by_id(score_pool(LmHeadConfig(normalize=False), replace(same, work=request_.work / "product")))
    cosines = by_id(score_pool(LmHeadConfig(), same))
    norm = np.sqrt(np.diag(product))
    assert norm[0] == 0  # a document of one token
    np.testing.assert_allclose(product, product.T, rtol=1e-4)
    np.testing.assert_allclose(product, cosines * np.outer(norm, norm), rtol=1e-4)
    np.testing.assert_allclose(np.diag(cosines)[1:], 1.0, atol=1e-5)
    assert not cosines[0].any()


def test_sparse_sketch_is_rises_rh_channel(request_: Request) -> None:
    """What is left of RISE's own signatures when the GH half is cut off."""
    ours = by_id(score_pool(LmHeadConfig(variant="sparse-sketch", sketch=SKETCH), request_))
    score_pool(RiseConfig(sketch=SKETCH, index_type="fp32"), replace(request_, work=request_.work / "rise"))
    sides = []
    for side in ("pool", "queries"):
        index = Index(request_.work / "rise" / "readout" / side)
        phi = np.concatenate(list(index.blocks()))[:, : SKETCH.kr * SKETCH.kh]
        sides.append(phi[np.argsort(index.doc_ids)])
    assert not ours[0].any()  # a query of one token
    np.testing.assert_allclose(ours[1:, 1:], cosine(sides[0][1:], sides[1][1:]), atol=2e-3)  # fp16


def test_a_wide_gradient_sketch_ranks_as_the_exact_gradient(request_: Request) -> None:
    exact = by_id(score_pool(LmHeadConfig(), request_))
    wide = by_id(score_pool(LmHeadConfig(variant="gradient-sketch"), request_))
    np.testing.assert_allclose(wide, exact, atol=0.03)
    stored = np.load(request_.work / "lm-head-gradient-sketch" / "pool" / "00000.npy")
    assert stored.shape[1] * stored.itemsize == 131_072
    centred = by_id(score_pool(LmHeadConfig(variant="gradient-sketch", calibration="center"), request_))
    assert np.abs(centred - wide).max() > 0.05


def test_what_does_not_fit_is_refused_before_it_starts(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    few = type("Memory", (), {"available": 100 << 20})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: few)
    monkeypatch.setattr(Readout, "hidden", lambda *_: pytest.fail("a forward pass over documents"))
    monkeypatch.setattr(Readout, "_check", lambda _: None)
    with pytest.raises(InputError, match=r"out of memory: .* needs about 0\.1 GiB, this machine has 0\.1 free; give"):
        score_pool(LmHeadConfig(), request_)
    assert not list(request_.work.rglob("*.npy"))


@pytest.mark.parametrize(("method", "given", "expected"), [
    ("lm-head", {"calibration": "center"}, "a calibration goes with sparse-sketch and gradient-sketch, not with exact"),
    ("lm-head", {"variant": "sparse-sketch", "normalize": False}, "normalize: false goes with exact and sparse"),
    ("lm-head", {"variant": "all"}, "field variant"), ("hidden", {"layer": 0}, "field layer"),
    ("hidden", {"layer": -1}, "field layer"), ("hidden", {"calibration": "whiten"}, "field calibration"),
    ("embedding", {"calibration": "power:2"}, "field calibration"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(method: str, given: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        parse(METHODS[method], given, "options")


# The command line


@pytest.fixture
def rise(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``rise score`` in this process: exit status and stderr."""
    for name, count in (("pool", 12), ("queries", 3)):
        rows = [{"id": f"{name}{i}", "text": " ".join(WORDS[i % 5 : i % 5 + 3 + i])} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rise", "score", "--model", str(model), "--pool",
                            str(tmp_path / "pool.jsonl"), "--queries", str(tmp_path / "queries.jsonl"), "--out",
                            str(tmp_path / "out.parquet"), "--precision", "float32", *options])  # fmt: skip
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def test_options_reach_the_methods_configuration(rise: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[MethodConfig] = []
    score = score_pool

    def look(config: MethodConfig, request: Request) -> Scores:
        seen.append(config)
        return score(config, request)

    monkeypatch.setattr("tasks.scoring.methods.score_pool", look)
    pairs = tmp_path / "pairs.parquet"
    for options in (
        ["--method", "hidden", "--option", "layer=1", "--calibration", "center", "--per-query", str(pairs)],
        ["--method", "lm-head", "--option", "variant=sparse", "--option", "sketch.tau=0.5", "--seed", "7"],
        ["--option", "sketch.max_top=9", "--kr", "8"],
    ):
        status, error = rise(*options)
        assert status == 0, error
    assert len(pq.read_table(pairs)) == 36
    assert seen == [
        HiddenConfig(layer=1, calibration="center"),
        LmHeadConfig(variant="sparse", sketch=SketchConfig(tau=0.5, seed=7)),
        RiseConfig(sketch=SketchConfig(max_top=9, kr=8)),
    ]
    assert pq.read_table(tmp_path / "out.parquet")["rank"].to_pylist() == list(range(1, 13))


@pytest.mark.parametrize(("options", "expected"), [
    (["--method", "hidden", "--option", "layer"], "--option needs key=value, got 'layer'"),
    (["--method", "hidden", "--option", "layer=["], "--option layer: the value '[' is not YAML"),
    (["--method", "hidden", "--option", "depth=3"], "field depth: Extra inputs are not permitted"),
    (["--method", "hidden", "--option", "layer=-1"], "options, field layer"),
    (["--method", "hidden", "--option", "layer=9"], "field layer: layer 9: the model has layers 1 to 2"),
    (["--method", "lm-head", "--option", "variant=whole"], "options, field variant: Input should be 'exact'"),
    (["--method", "lm-head", "--calibration", "center"], "a calibration goes with sparse-sketch"),
    (["--method", "bm25", "--option", "k1=0"], "options, field k1"),
])  # fmt: skip
def test_a_bad_option_is_one_line_and_exit_2(options: list[str], expected: str, rise: Any, tmp_path: Path) -> None:
    status, error = rise(*options)
    assert status == 2
    lines = [line for line in error.strip().splitlines() if not line.startswith("\r")]
    assert expected in lines[-1]
    assert lines[-1].startswith("rise: ")
    assert not (tmp_path / "out.parquet").exists()


def test_the_command_line_lists_every_method() -> None:
    assert set(cli.METHODS) == set(METHODS)


def test_notes_of_what_features_are_made_of_stand_beside_them(request_: Request) -> None:
    score_pool(HiddenConfig(layer=1), request_)
    plan = read_json(request_.work / "hidden-1" / "pool" / "plan.json")
    assert plan["layer"] == 1
    assert plan["precision"] == "torch.float32"
    assert {"model", "documents", "batch_tokens"} <= plan.keys()
