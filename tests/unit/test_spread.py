"""Standardised scores, and indexes made from other indexes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows import cli
from flows.cli import rise
from tasks.common.errors import InputError
from tasks.common.files import read_json, write_json
from tasks.scoring import calibration, index, search
from tasks.scoring.bits import pack
from tasks.scoring.build import append_index, build_index, query_index
from tasks.scoring.config import RECIPES, FitConfig, RiseConfig, ScorerConfig, SketchConfig
from tasks.scoring.convert import convert_index
from tasks.scoring.growing import SignatureConfig
from tasks.scoring.index import Index
from tasks.scoring.methods import Request, score_pool
from tasks.scoring.rivals.similarity import cosine_scores
from tasks.scoring.spread import Spread, sample
from tasks.scoring.store import bytes_a_document
from tests.tiny import tiny_llama
from tests.unit.test_index import ROOT, by_id, parquet, rows

SKETCH = SketchConfig(kr=16, kh=6, kg=12)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> ScorerConfig:
    model = tiny_llama(tmp_path_factory.mktemp("llama"))
    return ScorerConfig(model=str(model), batch_tokens=300, shard_tokens=200, precision="float32", threads=1)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents and one of a single token, whose signature is zero."""
    return parquet(tmp_path_factory.mktemp("pool") / "pool.parquet",
                   [*rows(40, 0), {"doc_id": "silent", "text": "x"}])  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pool: Path, scorer: ScorerConfig) -> Index:
    folder = tmp_path_factory.mktemp("whole") / "index"
    build_index(pool, folder, scorer, SKETCH, stored="fp32")
    return Index(folder)


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory, whole: Index) -> Index:
    folder = tmp_path_factory.mktemp("queries")
    return query_index(whole, parquet(folder / "q.parquet", rows(12, 1, "query")), folder / "index")


# The spread


def by_hand(phi_ND: np.ndarray, reference: list[int], row: int) -> float:
    """Median less 10th percentile of the scores with the reference."""
    scores = sorted(float(phi_ND[row] @ phi_ND[other]) for other in reference)
    return float(np.median(scores) - np.percentile(scores, 10))


def test_the_spread_is_that_of_the_scores_below_their_median() -> None:
    rng = np.random.default_rng(0)
    phi_ND = rng.standard_normal((30, 20)).astype(np.float32)
    reference = [0, 3, 4, 11, 29]
    made = Spread(phi_ND[reference])(phi_ND)
    assert made == pytest.approx([by_hand(phi_ND, reference, row) for row in range(30)], rel=1e-4)


def test_the_spread_of_packed_bits_is_that_of_their_signs() -> None:
    rng = np.random.default_rng(1)
    bits_ND = rng.random((25, 100)) < 0.5
    reference = sample([f"d{i}" for i in range(25)], 9)
    floats = Spread(calibration.signs(bits_ND)[reference])(calibration.signs(bits_ND))
    packed = Spread(pack(bits_ND)[reference], dimension=100)(pack(bits_ND))
    assert packed == pytest.approx(floats, rel=1e-4, abs=1e-6)


def test_equal_scores_have_the_unit_spread() -> None:
    phi_ND = np.ones((4, 3), dtype=np.float32)
    assert Spread(phi_ND)(phi_ND).tolist() == [1.0] * 4


def test_more_of_a_document_s_own_kind_leaves_its_spread() -> None:
    """Where a tenth of the reference is like the document, a standard deviation would double; the spread does not."""
    rng = np.random.default_rng(2)
    others = rng.standard_normal((200, 400)).astype(np.float32)
    kind = rng.standard_normal(400).astype(np.float32)
    alike = kind + 0.2 * rng.standard_normal((20, 400)).astype(np.float32)
    alone, among = Spread(others)(kind[None]), Spread(np.concatenate([others, alike]))(kind[None])
    assert among[0] == pytest.approx(alone[0], rel=0.15)
    assert np.std(np.concatenate([others, alike]) @ kind) > 2 * np.std(others @ kind)


def test_a_sample_depends_on_the_ids_alone() -> None:
    ids = [f"d{i}" for i in range(50)]
    drawn = {ids[place] for place in sample(ids, 10)}
    assert {ids[::-1][place] for place in sample(ids[::-1], 10)} == drawn
    assert len(drawn) == 10
    assert {ids[place] for place in sample(ids, 10, seed=1)} != drawn


@pytest.mark.parametrize("name", ["none", "center", "power:0.3", "median-bit"])
def test_standardised_scores_are_the_scores_over_the_spread(whole: Index, queries: Index, name: str) -> None:
    plain = search.score(whole, queries, calibrated=name)
    scaled = search.score(whole, queries, calibrated=name + "+spread")
    fitted = calibration.fit(name, [np.concatenate(list(whole.blocks()))])
    phi_ND = fitted.apply(np.concatenate(list(whole.blocks())))
    speaking = [row for row in range(len(whole)) if phi_ND[row].any()]
    spread = np.array([by_hand(phi_ND, speaking, row) or 1.0 for row in range(len(whole))])
    assert plain.per_query is not None
    assert scaled.per_query is not None
    assert scaled.per_query == pytest.approx(plain.per_query / spread, rel=1e-3, abs=1e-5)
    assert scaled.mean == pytest.approx(plain.mean / spread, rel=1e-3, abs=1e-5)
    assert scaled.mean[whole.doc_ids.index("silent")] == 0


def test_bits_and_floats_standardise_alike(whole: Index, queries: Index, tmp_path: Path) -> None:
    convert_index(whole, tmp_path / "bits", stored="bit", fit=FitConfig(documents=100))
    bits, floats = (search.score(one, queries, calibrated="median-bit+spread") for one in (Index(tmp_path / "bits"),
                                                                                         whole))  # fmt: skip
    assert bits.doc_ids == floats.doc_ids
    assert bits.mean == pytest.approx(floats.mean, rel=1e-3, abs=1e-5)


def test_features_of_a_rival_are_standardised_as_signatures_are(whole: Index, queries: Index) -> None:
    pool_ND, query_QD = (np.concatenate(list(one.blocks())) for one in (whole, queries))
    made = cosine_scores([pool_ND[:13], pool_ND[13:]], query_QD, "center+spread")
    assert made == pytest.approx(search.score(whole, queries, calibrated="center+spread").per_query, rel=1e-3, abs=1e-5)


def test_bits_keep_their_median_with_a_spread_too() -> None:
    assert RiseConfig(calibration="median-bit+spread", index_type="bit").calibration == "median-bit+spread"
    with pytest.raises(ValueError, match="median-bit"):
        RiseConfig(calibration="center+spread", index_type="bit")


# Conversion


@pytest.mark.parametrize("stored", ["fp16", "int8", "bit"])
def test_a_converted_index_holds_what_a_built_one_holds(
    whole: Index, pool: Path, scorer: ScorerConfig, tmp_path: Path, stored: str
) -> None:
    build_index(pool, tmp_path / "built", scorer, SKETCH, stored=stored, fit=None)  # type: ignore[arg-type]
    assert convert_index(whole, tmp_path / "made", stored=stored) == len(whole)  # type: ignore[arg-type]
    built, made = by_id(Index(tmp_path / "built")), by_id(Index(tmp_path / "made"))
    assert built.keys() == made.keys()
    for doc_id, phi_D in built.items():
        assert made[doc_id] == pytest.approx(phi_D, abs=1e-6), doc_id
    assert index.verify(tmp_path / "made") == (len(whole.shards), len(whole))


def test_a_conversion_goes_on_and_refuses_another(whole: Index, tmp_path: Path) -> None:
    convert_index(whole, tmp_path / "made", stored="int8")
    before = read_json(tmp_path / "made" / index.MANIFEST)
    (tmp_path / "made" / index.MANIFEST).unlink()
    (tmp_path / "made" / "shards" / "00001.json").unlink()
    convert_index(whole, tmp_path / "made", stored="int8")
    assert read_json(tmp_path / "made" / index.MANIFEST) == before
    with pytest.raises(InputError, match="type"):
        convert_index(whole, tmp_path / "made", stored="fp16")
    convert_index(whole, tmp_path / "bits", stored="bit")
    with pytest.raises(InputError, match="bits"):
        convert_index(Index(tmp_path / "bits"), tmp_path / "again", stored="int8")


# Indexes that keep the spread


@pytest.mark.parametrize(("stored", "name"), [("bit", "median-bit+spread"), ("fp32", "power:0.3+spread")])
def test_an_index_keeps_the_spread_of_what_was_built_and_appended(
    pool: Path, queries: Index, scorer: ScorerConfig, tmp_path: Path, stored: str, name: str
) -> None:
    fit = FitConfig(name=name, documents=100)
    build_index(pool, tmp_path / "index", scorer, SKETCH, stored=stored, fit=fit)  # type: ignore[arg-type]
    kept = Index(tmp_path / "index")
    made = search.score(kept, queries, calibrated=name)
    assert made.per_query is not None
    query_QD = np.concatenate(list(queries.blocks()))
    hits = search.mean_pooled(kept, query_QD, 8)
    order = sorted(range(len(kept)), key=lambda place: (-made.mean[place], kept.doc_ids[place]))[:8]
    assert [hit.doc_id for hit in hits] == [kept.doc_ids[place] for place in order]
    assert [hit.score for hit in hits] == pytest.approx([made.mean[place] for place in order], rel=1e-4)
    assert search.channels(kept, query_QD, hits).sum(axis=1) == pytest.approx([hit.score for hit in hits], rel=1e-3)
    best = search.per_query(kept, query_QD, 3)[0]
    assert best[0].score == pytest.approx(made.per_query[0].max(), rel=1e-4)

    before = {path: path.read_bytes() for path in (tmp_path / "index" / "shards").iterdir()}
    reference = (tmp_path / "index" / index.REFERENCE).read_bytes()
    append_index(parquet(tmp_path / "more.parquet", rows(9, 7, "more")), tmp_path / "index", scorer)
    assert all(path.read_bytes() == data for path, data in before.items())
    assert (tmp_path / "index" / index.REFERENCE).read_bytes() == reference
    longer = search.score(Index(tmp_path / "index"), queries, calibrated=name)
    assert longer.doc_ids[: len(kept)] == made.doc_ids
    assert len(longer.doc_ids) == len(kept) + 9
    assert longer.mean[: len(kept)] == pytest.approx(made.mean)
    assert index.verify(tmp_path / "index")[1] == len(kept) + 9
    file = tmp_path / "index" / index.REFERENCE
    file.write_bytes(file.read_bytes()[:-1] + b"\x5a")
    with pytest.raises(InputError, match=index.REFERENCE):
        index.verify(tmp_path / "index")


def test_a_killed_build_makes_the_spreads_that_are_missing(pool: Path, scorer: ScorerConfig, tmp_path: Path) -> None:
    fit = FitConfig(name="median-bit+spread")
    build_index(pool, tmp_path, scorer, SKETCH, stored="bit", fit=fit)
    before = read_json(tmp_path / index.MANIFEST)
    (tmp_path / index.MANIFEST).unlink()
    entry = read_json(tmp_path / "shards" / "00001.json")
    entry["sha256"].pop("00001.spread.npy")
    write_json(tmp_path / "shards" / "00001.json", entry)
    build_index(pool, tmp_path, scorer, SKETCH, stored="bit", fit=fit)
    assert read_json(tmp_path / index.MANIFEST) == before


def test_a_search_cannot_ask_for_a_spread_that_is_not_kept(whole: Index) -> None:
    with pytest.raises(InputError, match="keeps no spreads"):
        search.fitted_for(whole, "center+spread")


# What a fit may see


@pytest.mark.parametrize("name", ["center", "power:0.3+spread", "median-bit+spread"])
def test_neither_labels_nor_other_queries_reach_a_fit(
    pool: Path, scorer: ScorerConfig, tmp_path: Path, name: str
) -> None:
    """The scores for a query are the same bytes whatever the labels say and whatever else is asked."""
    documents = pq.read_table(pool)
    asked = pq.read_table(parquet(tmp_path / "q.parquet", rows(6, 1, "query")))
    made = []
    for number, (labels, count) in enumerate([("control", 6), ("junk", 6), ("control", 2)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        pq.write_table(documents.append_column("label", pa.array([labels] * len(documents))), folder / "pool.parquet")
        pq.write_table(asked.slice(0, count), folder / "queries.parquet")
        request = Request(folder / "pool.parquet", folder / "queries.parquet", scorer, folder / "work")
        index_type = "bit" if name.startswith("median") else "fp16"
        scores = score_pool(RiseConfig(sketch=SKETCH, calibration=name, index_type=index_type), request)
        assert scores.per_query is not None
        made.append({query: scores.per_query[row] for row, query in enumerate(scores.query_ids)})
    assert all((made[0][query] == made[1][query]).all() for query in made[0])
    assert len(made[2]) == 2
    for query, scored in made[2].items():
        assert scored == pytest.approx(made[0][query], rel=1e-5, abs=1e-7)


def test_a_recipe_stands_for_the_options_that_are_not_given(
    whole: Index, scorer: ScorerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pool.jsonl").write_text("\n".join(json.dumps(row) for row in rows(12, 3)))
    rise.main(["index", "build", "--model", scorer.model, "--data", str(tmp_path / "pool.jsonl"), "--out",
               str(tmp_path / "index"), "--recipe", "compact", "--kr", "16", "--precision", "float32"],
              standalone_mode=False)  # fmt: skip
    made = Index(tmp_path / "index")
    assert {name: made.manifest["sketch"][name] for name in ("kr", "kh", "kg", "km", "alpha")} == {
        "kr": 16, "kh": 24, "kg": 0, "km": 1920, "alpha": 1.0}  # fmt: skip
    assert (made.stored, made.calibration_name) == ("bit", "median-bit+spread")
    rise.main(["index", "convert", str(whole.directory), "--out", str(tmp_path / "bits"), "--dtype", "bit",
               "--calibration", "median-bit+spread"], standalone_mode=False)  # fmt: skip
    assert Index(tmp_path / "bits").standardizes
    assert capsys.readouterr().out.count("documents in the index") == 2


def test_a_recipe_stands_for_the_fields_that_are_not_given() -> None:
    sketch = {"kr": 256, "kh": 24, "kg": 0, "km": 1920, "alpha": 1.0}
    compact = RiseConfig.model_validate({"recipe": "compact"})
    assert compact == RiseConfig(sketch=SketchConfig(**sketch), calibration="median-bit+spread", index_type="bit")
    assert "recipe" not in compact.plain()  # a run knows its fields, whatever the recipe is later
    assert bytes_a_document("bit", compact.sketch.dimension) + 4 == 1012  # with the spread
    other = RiseConfig.model_validate({"recipe": "compact", "sketch": {"seed": 7}, "calibration": "median-bit"})
    assert other == RiseConfig(sketch=SketchConfig(**sketch, seed=7), calibration="median-bit", index_type="bit")
    assert RiseConfig.model_validate({"recipe": "paper"}) == RiseConfig()
    kept = SignatureConfig.model_validate({"recipe": "compact", "fit": {"seed": 7}})
    assert kept == SignatureConfig(sketch=compact.sketch, stored="bit", fit=FitConfig(name="median-bit+spread", seed=7))
    assert SignatureConfig.model_validate({"recipe": "paper"}) == SignatureConfig(stored="fp16", fit=None)
    assert SignatureConfig.model_validate({"recipe": "wide", "sketch": {"kr": 8}}).sketch.shape == "8/96/0+6144"
    for config in (RiseConfig, SignatureConfig):
        with pytest.raises(ValueError, match="no recipe 'small'; there are paper, compact, wide"):
            config.model_validate({"recipe": "small"})


def test_recipes_are_the_ones_that_the_study_chose_among() -> None:
    methods = yaml.safe_load((ROOT / "conf/studies/prospective.yaml").read_text())["methods"]
    for name in ("compact", "wide"):
        assert RiseConfig.model_validate({"recipe": name}) == RiseConfig.model_validate(methods[f"rise-{name}"])
    assert tuple(RECIPES) == cli.RECIPES
    with pytest.raises(InputError, match="a recipe is given by --recipe NAME"):
        rise.main(["score", "--model", "m", "--pool", "p.jsonl", "--queries", "q.jsonl", "--out", "o.parquet",
                   "--option", "recipe=compact"], standalone_mode=False)  # fmt: skip
