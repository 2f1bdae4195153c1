"""Stage 3: the cut, the oracle, and the metrics against scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from sklearn.metrics import average_precision_score, roc_auc_score

from tasks.common.errors import InputError
from tasks.common.files import read_json
from tasks.selection.config import SelectionConfig
from tasks.selection.metrics import bootstrap, per_query_metrics, statistics
from tasks.selection.select import oracle, select


def write_pool(path: Path, labels: list[str | None]) -> Path:
    """A pool with ids d00, d01 … and the given labels."""
    ids = [f"d{i:02}" for i in range(len(labels))]
    pq.write_table(
        pa.table({
            "doc_id": ids, "text": [f"text {i}" for i in ids],
            "label": pa.array(labels, pa.string()), "source": ["s"] * len(ids),
        }), path,
    )  # fmt: skip
    return path


def write_scores(path: Path, scores: dict[str, float | None]) -> Path:
    pq.write_table(pa.table({"doc_id": list(scores), "score": pa.array(list(scores.values()), pa.float64())}), path)
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write_pool(tmp_path / "pool.parquet", ["control", "junk"] * 5)


def test_takes_the_highest_scores_and_breaks_ties_by_id(tmp_path: Path, pool: Path) -> None:
    scores = {f"d{i:02}": 0.5 for i in reversed(range(10))} | {"d07": 0.9, "d01": -0.0, "d00": 0.0}
    rows = select(SelectionConfig(k=4), write_scores(tmp_path / "scores.parquet", scores), pool, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "selected.parquet")
    assert rows == 4
    assert table.column_names == ["doc_id", "text", "label", "source", "rank"]
    assert table["doc_id"].to_pylist() == ["d07", "d02", "d03", "d04"]
    assert table["rank"].to_pylist() == [1, 2, 3, 4]
    assert table["text"].to_pylist()[0] == "text d07"

    everything = select(SelectionConfig(k=10), tmp_path / "scores.parquet", pool, tmp_path / "all")
    order = pq.read_table(tmp_path / "all" / "selected.parquet")["doc_id"].to_pylist()
    assert everything == 10
    assert order[-2:] == ["d00", "d01"], "0.0 and -0.0 are one score"


def test_the_order_of_rows_in_the_files_does_not_matter(tmp_path: Path, pool: Path) -> None:
    scores = {f"d{i:02}": float(i % 3) for i in range(10)}
    write_scores(tmp_path / "a.parquet", scores)
    write_scores(tmp_path / "b.parquet", dict(sorted(scores.items(), reverse=True)))
    for name in "ab":
        select(SelectionConfig(share=0.5), tmp_path / f"{name}.parquet", pool, tmp_path / name)
    assert (tmp_path / "a/selected.parquet").read_bytes() == (tmp_path / "b/selected.parquet").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d03": float("nan")}, r"row 4, field score: the score of document 'd03' is nan"),
        ({"d03": None}, r"row 4, field score: the score of document 'd03' is nan"),
        ({"d03": float("inf")}, r"row 4, field score: the score of document 'd03' is inf"),
        ({"x": 1.0}, r"row 11, field doc_id: the document 'x' is not in the pool"),
    ],
)
def test_scores_that_rank_nothing_are_refused(
    tmp_path: Path, pool: Path, changes: dict[str, float | None], message: str
) -> None:
    scores: dict[str, float | None] = {f"d{i:02}": float(i) for i in range(10)} | changes
    with pytest.raises(InputError, match=message):
        select(SelectionConfig(k=2), write_scores(tmp_path / "scores.parquet", scores), pool, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_document_without_a_score_is_named(tmp_path: Path, pool: Path) -> None:
    scores = write_scores(tmp_path / "scores.parquet", {f"d{i:02}": float(i) for i in range(9)})
    with pytest.raises(InputError, match=r"pool\.parquet, row 10, field doc_id: the document 'd09' has no score"):
        select(SelectionConfig(k=2), scores, pool, tmp_path / "out")


def test_a_document_scored_twice_is_named(tmp_path: Path, pool: Path) -> None:
    ids = [f"d{i:02}" for i in range(10)] + ["d04"]
    pq.write_table(pa.table({"doc_id": ids, "score": [1.0] * 11}), tmp_path / "scores.parquet")
    with pytest.raises(InputError, match="row 11, field doc_id: the document 'd04' is scored twice"):
        select(SelectionConfig(k=2), tmp_path / "scores.parquet", pool, tmp_path / "out")


def test_k_larger_than_the_pool_is_refused(tmp_path: Path, pool: Path) -> None:
    scores = write_scores(tmp_path / "scores.parquet", {f"d{i:02}": float(i) for i in range(10)})
    with pytest.raises(InputError, match=r"selection\.k: 11 documents are wanted, and the pool has 10"):
        select(SelectionConfig(k=11), scores, pool, tmp_path / "out")
    with pytest.raises(InputError, match="11 documents are wanted"):
        oracle(SelectionConfig(k=11), pool, tmp_path / "out")


def test_the_oracle_takes_positive_documents_only_and_says_when_they_are_fewer(tmp_path: Path, pool: Path) -> None:
    assert oracle(SelectionConfig(k=3), pool, tmp_path / "three") == 3
    table = pq.read_table(tmp_path / "three" / "selected.parquet")
    assert set(table["label"].to_pylist()) == {"control"}
    assert read_json(tmp_path / "three" / "notes.json") == []

    draws = set()
    for seed in range(8):
        oracle(SelectionConfig(k=3, seed=seed), pool, tmp_path / str(seed))
        draws.add(tuple(pq.read_table(tmp_path / str(seed) / "selected.parquet")["doc_id"].to_pylist()))
    assert len(draws) > 3, "the seed draws"

    assert oracle(SelectionConfig(k=9), pool, tmp_path / "nine") == 5
    (note,) = read_json(tmp_path / "nine" / "notes.json")
    assert "trains on 5 documents and not on 9" in note


def test_an_oracle_without_positive_documents_is_refused(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool.parquet", ["junk", None])
    with pytest.raises(InputError, match=r"field label: no document has the positive label 'control'"):
        oracle(SelectionConfig(k=1), pool, tmp_path / "out")


def test_a_pool_with_an_id_twice_is_refused(tmp_path: Path, pool: Path) -> None:
    table = pq.read_table(pool)
    pq.write_table(pa.concat_tables([table, table.slice(3, 1)]), pool)
    with pytest.raises(InputError, match="two documents have the id 'd03'"):
        oracle(SelectionConfig(k=1), pool, tmp_path / "out")


def test_sizes() -> None:
    assert SelectionConfig().share == 0.1
    assert SelectionConfig(k=7).share is None
    assert SelectionConfig().size(1996) == 200
    assert SelectionConfig().size(3) == 1
    assert SelectionConfig(purity_at=(0.5, 3, 0.001, 5)).cuts(10) == [1, 3, 5]
    with pytest.raises(ValidationError, match="share or k, not both"):
        SelectionConfig(k=7, share=0.1)
    with pytest.raises(ValidationError, match=r"not 2\.5"):
        SelectionConfig(purity_at=(2.5,))
    with pytest.raises(InputError, match=r"selection\.purity_at: 20 documents are wanted"):
        SelectionConfig(purity_at=(20,)).cuts(10)


def rankings() -> list[tuple[np.ndarray, np.ndarray]]:
    """Rankings with many ties, with none, and with everything tied."""
    random = np.random.default_rng(0)
    found = []
    for size, levels in ((40, 4), (200, 1000), (300, 12), (50, 1)):
        labels = (random.random(size) < 0.3).astype(float)
        found.append((np.round(random.random(size) * levels + labels) / 7, labels))
    return found


@pytest.mark.parametrize(("scores", "labels"), rankings())
def test_statistics_equal_scikit_learn(scores: np.ndarray, labels: np.ndarray) -> None:
    found = statistics(scores, labels, ks=(1, 10, len(scores)))
    assert found.auprc == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert found.auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    order = np.lexsort((np.arange(len(scores)), -scores))
    expected = (labels[order[0]], labels[order[:10]].mean(), labels.mean())
    assert found.purity == pytest.approx(expected, abs=1e-12)


def test_tied_documents_do_not_leak_their_labels_by_order() -> None:
    for labels in (np.array([1.0, 1, 0, 0, 0]), np.array([0.0, 0, 0, 1, 1])):
        found = statistics(np.ones(5), labels)
        assert found.auroc == 0.5
        assert found.auprc == pytest.approx(0.4)


def test_documents_without_a_label_are_left_out() -> None:
    scores, labels = rankings()[2]
    holes = np.where(np.arange(len(labels)) % 5 == 0, np.nan, labels)
    kept = ~np.isnan(holes)
    found = statistics(scores, holes, ks=(25,))
    assert found.auprc == pytest.approx(average_precision_score(labels[kept], scores[kept]))
    assert found.auroc == pytest.approx(roc_auc_score(labels[kept], scores[kept]))
    order = np.lexsort((np.arange(len(scores)), -scores))[:25]
    assert found.purity[0] == pytest.approx(np.nanmean(holes[order]))
    assert np.isnan(statistics(scores, np.full(len(scores), np.nan), ks=(3,)).purity[0])


def test_the_bootstrap_is_that_of_resampled_documents() -> None:
    """Against the plain way: draw documents, sort them, let scikit-learn count."""
    scores, labels = rankings()[0]
    intervals = bootstrap(scores, labels, (7,), resamples=60, confidence=0.9, seed=3)
    random, values = np.random.default_rng(3), []
    for _ in range(60):
        drawn = np.sort(random.integers(0, len(scores), len(scores)))
        s, y = scores[drawn], labels[drawn]
        first = np.argsort(-s, kind="stable")[:7]
        values.append((y[first].mean(), average_precision_score(y, s), roc_auc_score(y, s)))
    expected = np.quantile(np.array(values), (0.05, 0.95), axis=0).T
    np.testing.assert_allclose([intervals.purity[0], intervals.auprc, intervals.auroc], expected, atol=1e-12)


def test_intervals_are_seeded_and_hold_the_value() -> None:
    scores, labels = rankings()[1]
    value = statistics(scores, labels, (20,))
    first, again, other = (
        bootstrap(scores, labels, (20,), resamples=300, confidence=0.95, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.auroc[0] < value.auroc < first.auroc[1]
    assert first.auprc[0] < value.auprc < first.auprc[1]
    assert first.purity[0][0] <= value.purity[0] <= first.purity[0][1]


def test_per_query_metrics_equal_the_plain_computation() -> None:
    random = np.random.default_rng(5)
    labels = random.random(60) < 0.3
    scores = np.round(random.random((7, 60)) * 8 + labels) / 4  # many ties
    found = per_query_metrics(scores, labels, (5, 10))
    means = {}
    for k in (5, 10):
        values = []
        for row in scores:
            order = sorted(range(60), key=lambda i: (-row[i], i))
            chosen = order[:k] + order[-k:]
            if 0 < labels[chosen].sum() < 2 * k:
                values.append((average_precision_score(labels[chosen], row[chosen]),
                               roc_auc_score(labels[chosen], row[chosen])))  # fmt: skip
        means[k] = np.mean(values, axis=0)
        assert found.queries_at[k] == len(values)
        assert (found.auprc_at[k], found.auroc_at[k]) == pytest.approx(tuple(means[k]), abs=1e-12)
    assert (found.auprc, found.auroc) == pytest.approx(tuple((means[5] + means[10]) / 2), abs=1e-12)


def test_a_query_with_one_class_only_is_left_out() -> None:
    labels = np.array([True, False, False, False, False, False])
    scores = np.array([[9.0, 5, 4, 3, 2, 1], [3.0, 9, 8, 4, 2, 1]])  # the second has no positive in its 2K
    found = per_query_metrics(scores, labels, (2,))
    assert found.queries_at == {2: 1}
    assert (found.auprc, found.auroc) == (1.0, 1.0)
    with pytest.raises(InputError, match="at K = 2 no query has both"):
        per_query_metrics(scores[1:], labels, (2,))
    with pytest.raises(InputError, match="K = 4 needs 8 candidates, and there are 6"):
        per_query_metrics(scores, labels, (4,))
    with pytest.raises(InputError, match="not a finite number"):
        per_query_metrics(scores * np.nan, labels, (2,))
