"""The studies' metrics against scikit-learn, the rule that chooses, costs, and the ledger and report made of them."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from tasks.common.errors import InputError
from tasks.common.files import sha256_file
from tasks.common.stage import digest_directory
from tasks.common.usage import Usage, kept_bytes, measured, read_usage, searching
from tasks.reporting.study import Unified, choice_table, duels, gather, study_table
from tasks.selection.choice import RuleConfig, choose
from tasks.selection.metrics import bootstrap, per_query_metrics
from tasks.selection.retrieval import METRICS, RetrievalConfig, query_values, retrieve
from tasks.selection.study_ledger import Absent, Judged, PoolFiles, open_study, study_digest, write_study

KS = (2, 5)
DOCUMENTS, QUERIES = 40, 6


def write_pool(folder: Path, *, positives: int = 10) -> Path:
    """A pool of 40 documents, the first of them control, and 6 queries."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"d{number:02}" for number in range(DOCUMENTS)]
    labels = ["control" if number < positives else "junk" for number in range(DOCUMENTS)]
    pq.write_table(pa.table({"doc_id": ids, "text": [f"secret {one}" for one in ids], "label": labels,
                             "source": ["s"] * DOCUMENTS}), folder / "pool.parquet")  # fmt: skip
    pq.write_table(pa.table({"doc_id": [f"q{number}" for number in range(QUERIES)]}), folder / "queries.parquet")
    pq.write_table(pa.table({"doc_id": ids, "n_tokens": [10 + number for number in range(DOCUMENTS)]}),
                   folder / "tokens.parquet")  # fmt: skip
    return folder


def scores_of(seed: int, *, pull: float = 1.0) -> NDArray[np.float64]:
    """Scores (6, 40) in which the first ten documents stand out by ``pull``; rounded, so that there are ties."""
    noise = np.random.default_rng(seed).normal(size=(QUERIES, DOCUMENTS))
    return np.round(noise + pull * (np.arange(DOCUMENTS) < 10), 1)


def write_scored(folder: Path, scores_QN: NDArray[np.float64], *, per_query: bool = True, order: int = 0) -> Path:
    """What the scoring stage leaves, in another order of rows for every ``order``."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(order)
    mean = random.permutation([(f"d{number:02}", value) for number, value in enumerate(scores_QN.mean(axis=0))])
    pq.write_table(pa.table({"doc_id": mean[:, 0].tolist(), "score": mean[:, 1].astype(float)}),
                   folder / "scores.parquet")  # fmt: skip
    if per_query:
        pairs = [(f"q{query}", f"d{number:02}", scores_QN[query, number]) for query, number
                 in random.permutation(list(itertools.product(range(QUERIES), range(DOCUMENTS))))]  # fmt: skip
        pq.write_table(pa.table({name: [pair[place] for pair in pairs] for place, name
                                 in enumerate(("query_id", "doc_id", "score"))}), folder / "per_query.parquet")
    return folder


def metrics(folder: Path) -> dict[tuple[str, int | None], dict[str, Any]]:
    return {(row["metric"], row["k"]): row for row in pq.read_table(folder / METRICS).to_pylist()}


CONFIG = RetrievalConfig(positive="control", ks=KS, resamples=200)


def test_the_metrics_are_the_papers_and_scikit_learns(tmp_path: Path) -> None:
    scores_QN, labels = scores_of(0), np.arange(DOCUMENTS) < 10
    pool, scored = write_pool(tmp_path / "pool"), write_scored(tmp_path / "scored", scores_QN)
    assert retrieve(CONFIG, pool, scored, tmp_path / "out") == 9
    found = metrics(tmp_path / "out")
    paper = per_query_metrics(scores_QN, labels, KS)
    for k in KS:
        values = []
        for row in scores_QN:
            order = np.argsort(-row, kind="stable")
            chosen = [*order[:k], *order[-k:]]
            if 0 < labels[chosen].sum() < 2 * k:
                values.append((average_precision_score(labels[chosen], row[chosen]),
                               roc_auc_score(labels[chosen], row[chosen])))  # fmt: skip
        auprc, auroc = np.mean(values, axis=0)
        assert found["pq_auprc_at", k]["value"] == pytest.approx(auprc) == pytest.approx(paper.auprc_at[k])
        assert found["pq_auroc_at", k]["value"] == pytest.approx(auroc) == pytest.approx(paper.auroc_at[k])
        assert found["pq_auprc_at", k]["n"] == paper.queries_at[k] == len(values)
    assert found["pq_auprc", None]["value"] == pytest.approx(paper.auprc)
    assert found["pq_auroc", None]["value"] == pytest.approx(paper.auroc)
    mean = scores_QN.mean(axis=0)
    assert found["auprc", None]["value"] == pytest.approx(average_precision_score(labels, mean))
    assert found["auroc", None]["value"] == pytest.approx(roc_auc_score(labels, mean))
    assert found["purity", 10]["value"] == labels[np.argsort(-mean, kind="stable")[:10]].mean()
    bounds = bootstrap(mean, labels.astype(float), [], resamples=200, confidence=0.95, seed=42)
    assert (found["auprc", None]["low"], found["auprc", None]["high"]) == bounds.auprc
    drawn, random = [], np.random.default_rng(42)
    for _ in range(200):
        chosen = random.integers(0, DOCUMENTS, DOCUMENTS)
        best = sorted(chosen, key=lambda place: (-mean[place], place))[: labels[chosen].sum()]
        drawn.append(labels[best].mean())
    assert (found["purity", 10]["low"], found["purity", 10]["high"]) == pytest.approx(
        np.quantile(drawn, (0.025, 0.975)).tolist())  # fmt: skip
    for name in ("pq_auprc", "pq_auroc"):
        row = found[name, None]
        assert row["low"] < row["value"] < row["high"]


def test_a_perfect_ranking_is_not_made_uncertain_by_how_many_it_could_find(tmp_path: Path) -> None:
    scores_QN = scores_of(5, pull=30.0)
    retrieve(CONFIG, write_pool(tmp_path / "pool"), write_scored(tmp_path / "scored", scores_QN), tmp_path / "out")
    row = metrics(tmp_path / "out")["purity", 10]
    assert (row["low"], row["value"], row["high"]) == (1.0, 1.0, 1.0)


def test_the_interval_over_queries_is_that_of_resampled_queries(tmp_path: Path) -> None:
    scores_QN, labels = scores_of(1), np.arange(DOCUMENTS) < 10
    retrieve(CONFIG.model_copy(update={"resamples": 2000}), write_pool(tmp_path / "pool"),
             write_scored(tmp_path / "scored", scores_QN), tmp_path / "out")  # fmt: skip
    values = query_values(scores_QN, labels, KS)[:, :, 0]
    random = np.random.default_rng(0)
    drawn = [np.nanmean(values[random.integers(0, QUERIES, QUERIES)], axis=0).mean() for _ in range(2000)]
    row = metrics(tmp_path / "out")["pq_auprc", None]
    assert (row["low"], row["high"]) == pytest.approx(np.quantile(drawn, (0.025, 0.975)).tolist(), abs=0.03)


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool")
    for order in (1, 2):
        retrieve(CONFIG, pool, write_scored(tmp_path / f"scored{order}", scores_of(2), order=order),
                 tmp_path / f"out{order}")  # fmt: skip
    assert sha256_file(tmp_path / "out1" / METRICS) == sha256_file(tmp_path / "out2" / METRICS)


def test_one_ranking_stands_for_every_query(tmp_path: Path) -> None:
    pool, ranking = write_pool(tmp_path / "pool"), scores_of(3)[:1].repeat(QUERIES, axis=0)
    retrieve(CONFIG, pool, write_scored(tmp_path / "with", ranking), tmp_path / "a")
    retrieve(CONFIG, pool, write_scored(tmp_path / "without", ranking, per_query=False), tmp_path / "b")
    with_queries, without = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    for place, row in without.items():
        assert row["value"] == pytest.approx(with_queries[place]["value"])
        assert row["n"] == with_queries[place]["n"]
    assert without["pq_auprc", None]["low"] is None, "queries that are all alike say nothing about other queries"
    assert without["purity", 10]["low"] is not None


def test_a_k_without_both_classes_is_not_defined(tmp_path: Path) -> None:
    """With 27.5 the first document is the fourth: the two best and the two worst are junk, among five it is there."""
    scores_QN = np.tile(np.arange(DOCUMENTS, 0, -1.0), (QUERIES, 1))
    scores_QN[:, :10] = np.linspace(20, 19, 10)
    scores_QN[:, 0] = 36.5
    retrieve(CONFIG, write_pool(tmp_path / "pool"), write_scored(tmp_path / "s", scores_QN), tmp_path / "out")
    found = metrics(tmp_path / "out")
    # Documents 10 to 39 score 30 down to 1; the first document with its 36.5 is the best.
    assert found["pq_auprc_at", 2]["value"] == 1.0
    scores_QN[:, 0] = 27.5
    retrieve(CONFIG, tmp_path / "pool", write_scored(tmp_path / "s", scores_QN), tmp_path / "out")
    found = metrics(tmp_path / "out")
    assert (found["pq_auprc_at", 2]["value"], found["pq_auprc_at", 2]["n"]) == (None, 0)
    assert found["pq_auprc_at", 5]["value"] == pytest.approx(1 / 4)
    assert found["pq_auprc", None]["value"] is None
    assert found["pq_auprc", None]["low"] is None
    assert found["auprc", None]["value"] is not None


def test_what_is_no_scored_pool_is_refused(tmp_path: Path) -> None:
    pool, out = write_pool(tmp_path / "pool"), tmp_path / "out"
    scored = write_scored(tmp_path / "scored", scores_of(4))
    with pytest.raises(InputError, match=r"at K = 21 needs 42 documents, and there are 40"):
        retrieve(CONFIG.model_copy(update={"ks": (21,)}), pool, scored, out)
    with pytest.raises(InputError, match="all or none"):
        retrieve(CONFIG.model_copy(update={"positive": "medical"}), pool, scored, out)
    table = pq.read_table(scored / "per_query.parquet")
    pq.write_table(table.slice(1), scored / "per_query.parquet")
    with pytest.raises(InputError, match="a score for each of 6 queries and 40 documents"):
        retrieve(CONFIG, pool, scored, out)
    pq.write_table(table.set_column(2, "score", pa.array([float("nan"), *table["score"].to_pylist()[1:]])),
                   scored / "per_query.parquet")  # fmt: skip
    with pytest.raises(InputError, match="not a finite number"):
        retrieve(CONFIG, pool, scored, out)
    assert not out.exists()


FIGURES: dict[tuple[str, str], dict[str, float | None]] = {
    ("a", "pq_auprc"): {"x": 0.9, "y": 0.8, "z": 0.7, "other": 1.0},
    ("a", "purity"): {"x": 0.9, "y": 0.8, "z": 0.7, "other": 1.0},
    ("b", "pq_auprc"): {"x": 0.1, "y": 0.8, "z": 0.8, "other": 1.0},
    ("b", "purity"): {"x": 0.9, "y": 0.8, "z": None, "other": 1.0},
}
SIZES: dict[str, float | None] = {"x": 100.0, "y": 768.0, "z": 768.0, "other": None}


def test_the_best_worst_case_wins_over_the_best_mean() -> None:
    placed = choose(RuleConfig(candidates=("z", "x", "y")), FIGURES, SIZES)
    assert [(one.arm, one.worst, one.mean, one.chosen) for one in placed] == [
        ("y", 2.0, 1.875, True), ("x", 3.0, 1.5, False), ("z", 3.0, 2.625, False)]  # fmt: skip
    assert placed[0].ranks["b", "pq_auprc"] == 1.5, "y and z share the first two ranks there"
    assert placed[2].ranks["b", "purity"] == 3.0, "what is not known comes last"


def test_by_shortfall_a_small_difference_counts_for_less_than_a_large_one() -> None:
    figures: dict[tuple[str, str], dict[str, float | None]] = {
        ("a", "purity"): {"x": 0.99, "y": 0.98, "z": 0.97}, ("b", "purity"): {"x": 0.4, "y": 0.7, "z": 0.8}}
    candidates = ("x", "y", "z")
    by_rank = choose(RuleConfig(candidates=candidates), figures, SIZES)
    assert [(one.arm, one.worst) for one in by_rank] == [("y", 2.0), ("x", 3.0), ("z", 3.0)]
    placed = choose(RuleConfig(candidates=candidates, by="shortfall"), figures, SIZES)
    assert [one.arm for one in placed] == ["z", "y", "x"]
    assert [one.shortfall for one in placed] == pytest.approx([0.02, 0.1, 0.4])
    assert [one.chosen for one in placed] == [True, False, False]
    unknown = choose(RuleConfig(candidates=("y", "z"), by="shortfall"), FIGURES, SIZES)
    assert [(one.arm, one.shortfall) for one in unknown] == [("y", 0.0), ("z", float("inf"))]


def test_the_bound_on_bytes_counts_before_the_ranks() -> None:
    placed = choose(RuleConfig(candidates=("x", "y", "other"), max_bytes=768), FIGURES, SIZES)
    assert [(one.arm, one.worst, one.mean) for one in placed] == [("x", 2.0, 1.25), ("y", 2.0, 1.75)]
    with pytest.raises(InputError, match="at most 99 bytes"):
        choose(RuleConfig(candidates=("x", "y", "other"), max_bytes=99), FIGURES, SIZES)
    assert [one.arm for one in choose(RuleConfig(candidates=("x", "other")), FIGURES, SIZES)] == ["other", "x"]


@pytest.mark.parametrize(("sizes", "first"), [({"p": 2.0, "q": 1.0}, "q"), ({"p": None, "q": 1.0}, "q"), ({}, "p")])
def test_ties_go_to_fewer_bytes_then_to_the_name(sizes: dict[str, float | None], first: str) -> None:
    figures: Any = {("a", "purity"): {"p": 0.5, "q": 0.5}, ("b", "purity"): {"p": 0.1 + 0.2, "q": 0.3}}
    placed = choose(RuleConfig(candidates=("q", "p")), figures, sizes)
    assert [one.worst for one in placed] == [1.5, 1.5]
    assert placed[0].arm == first


def test_a_rule_without_figures_is_refused() -> None:
    with pytest.raises(InputError, match="none of them is scored"):
        choose(RuleConfig(candidates=("x",)), {}, {})
    with pytest.raises(InputError, match="'w' is scored on no dev pool"):
        choose(RuleConfig(candidates=("x", "w")), FIGURES, {})


def test_usage_measures_time_search_and_the_peak_of_this_work_alone(tmp_path: Path) -> None:
    with measured() as large:
        kept = np.ones(64 << 20, dtype=np.uint8)
        del kept
    with measured() as small, searching():
        time.sleep(0.02)
    with searching():
        pass  # outside of a measurement it counts nothing
    assert large.peak_mib is not None
    assert small.peak_mib is not None
    assert large.peak_mib > small.peak_mib + 40, "the peak is forgotten between two measurements"
    assert large.search_seconds is None
    assert small.search_seconds is not None
    assert 0.02 <= small.search_seconds <= small.seconds
    small.queries = 3
    before = digest_directory(tmp_path)
    small.write(tmp_path)
    assert digest_directory(tmp_path) == before
    assert read_usage(tmp_path) == small
    assert read_usage(tmp_path / "none") == Usage()


def test_kept_bytes_are_the_features_of_the_pool(tmp_path: Path) -> None:
    for name, size in {"features/pool/0.npy": 70, "features/queries/0.npy": 500, "scores.parquet": 90,
                       "per_query.parquet": 90, "timings.json": 9, "work.json": 9, "index.bin": 30}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert kept_bytes(tmp_path) == 100


def build(folder: Path, *, absent: bool = False, rule: RuleConfig | None = None, seconds: float = 2.0) -> Path:
    """The ledger of a study of two pools, two paradigms and three arms, one of them with two seeds."""
    methods = {"length": {"method": "length"}, "rise": {"method": "rise"}, "rival": {"method": "trackstar"}}
    pools, judged, missing = {}, [], []
    for number, (name, split) in enumerate((("first", "dev"), ("second", "heldout"))):
        pool = write_pool(folder / name)
        pools[name] = PoolFiles("Howdy!", split, "control", pool, pool / "tokens.parquet")
        for place, (paradigm, (arm, seed)) in enumerate(itertools.product(
            ("predict", "recall"), (("length", None), ("rise", 1), ("rise", 2), ("rival", None))
        )):  # fmt: skip
            if absent and arm == "rival":
                missing.append(Absent(name, paradigm, arm, seed, "out of memory"))
                continue
            where = folder / f"{name}.{paradigm}.{arm}.{seed}"
            write_scored(where, scores_of(100 * number + place, pull=1.5 if arm == "rise" else 0.5),
                         per_query=arm != "length")  # fmt: skip
            retrieve(CONFIG.model_copy(update={"resamples": 40}), pool, where, where)
            Usage(seconds, 0.6 if arm == "rise" else None, 100.0, 768.0 if arm == "rise" else None, 6).write(where)
            Usage(seconds=9.0, peak_mib=900.0).write(folder / "readout")
            readout = folder / "readout" if arm == "rise" else None
            judged.append(Judged(name, paradigm, arm, seed, where, where, readout))
    write_study(folder / "study.duckdb", pools=pools, methods=methods, judged=judged, absent=missing, rule=rule,
                confidence=0.95, stages=[])  # fmt: skip
    return folder / "study.duckdb"


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("study"), rule=RuleConfig(candidates=("rise", "length")))


def test_the_ledger_holds_metrics_and_costs_and_the_mean_over_seeds(book: Path) -> None:
    with open_study(book) as con:
        study = gather(con)
        raw = con.execute("SELECT pq_auprc FROM rankings WHERE pool = 'first' AND paradigm = 'predict' "
                          "AND method = 'rise' ORDER BY seed").fetchall()  # fmt: skip
    assert [(pool["positives"], pool["queries"], pool["mean_tokens"], pool["mean_tokens_positive"])
            for pool in study.pools] == [(10, 6, 29.5, 14.5)] * 2  # fmt: skip
    rise = study.figures["first", "predict", "rise"]
    assert rise["seeds"] == 2
    assert rise["pq_auprc"] == pytest.approx((raw[0][0] + raw[1][0]) / 2)
    assert [rise["pq_least"], rise["pq_most"]] == sorted(value for (value,) in raw)
    assert rise["pq_least"] < rise["pq_most"]
    assert list(rise["at"]) == [2, 5]
    assert (rise["build_seconds"], rise["peak_mib"], rise["shared"]) == (9.0 + 2.0 - 0.6, 900.0, True)
    assert rise["query_ms"] == pytest.approx(100.0)
    length = study.figures["first", "predict", "length"]
    assert (length["build_seconds"], length["bytes_a_document"], length["query_ms"]) == (2.0, None, None)


def test_the_unified_cell_is_the_papers(book: Path) -> None:
    with open_study(book) as con:
        study = gather(con)
    predict, recall = (study.figures["first", paradigm, "rise"]["pq_auprc"] for paradigm in ("predict", "recall"))
    cell, overall = study.unified("dev")["rise"]
    assert cell == overall == Unified((recall + predict) / 2, abs(recall - predict) / 2)
    assert str(Unified(0.998, 0.002)) == "0.998 ±0.002"
    assert str(Unified(0.998, None)) == "0.998"
    printed = [line.split("  ") for line in study_table(book).splitlines()]
    assert any(line[0] == "rise" and str(cell) in line for line in printed)


def test_wins_and_losses_are_counted_alike(book: Path) -> None:
    with open_study(book) as con:
        study = gather(con)
    ours, theirs = (duels(study, default, "predict") for default in ("rise", "rival"))
    assert set(ours) == {"length", "rival"}
    for place, duel in ours["rival"].items():
        other = theirs["rise"][place]
        assert duel is not None
        assert other is not None
        assert duel.difference == -other.difference
        assert duel.clear == other.clear
        assert {duel.outcome, other.outcome} in ({"win", "loss"}, {"tie"})
    assert ours["rival"]["first", "pq_auprc"].outcome == "win"  # type: ignore[union-attr]


def test_what_could_not_run_is_said_in_its_row(tmp_path: Path) -> None:
    book = build(tmp_path, absent=True, rule=RuleConfig(candidates=("rise", "length", "rival")))
    with open_study(book) as con:
        study = gather(con)
        assert con.execute("SELECT count(*) FROM absent").fetchone() == (4,)
    assert study.unified("heldout")["rival"] == [None, None]
    assert study.why("heldout", "rival", "Howdy!") == "out of memory"
    assert study.why("heldout", "rise") == "–"
    assert "out of memory" in study_table(book)
    assert duels(study, "rise", "predict")["rival"]["first", "purity"] is None


def test_the_choice_needs_no_heldout_pool_and_no_recall(book: Path, tmp_path: Path) -> None:
    rule = RuleConfig(candidates=("rise", "length"))
    with open_study(book) as con:
        assert con.execute("SELECT arm FROM choice WHERE chosen").fetchall() == [("rise",)]
        assert con.execute("SELECT DISTINCT pool FROM ranks").fetchall() == [("first",)]
    assert choice_table(book, rule).endswith("chosen: rise")
    assert choice_table(book, RuleConfig(candidates=("length",))).endswith("chosen: length")
    with pytest.raises(InputError, match="no candidate keeps at most 5 bytes"):
        choice_table(book, RuleConfig(candidates=("rise",), max_bytes=5))
    with pytest.raises(InputError, match="no such ledger; `rise study` makes it"):
        choice_table(tmp_path / "none.duckdb", rule)


def test_the_digest_of_a_ledger_has_no_times(book: Path, tmp_path: Path) -> None:
    assert study_digest(build(tmp_path / "later", seconds=7.0)) == study_digest(book)
    assert study_digest(build(tmp_path / "less", absent=True)) != study_digest(book)
