"""The index: types, calibration, append, resume, corruption, search; and ``rise index`` and ``rise attribute``."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.common.errors import InputError
from tasks.common.files import read_json
from tasks.common.stage import digest_directory
from tasks.scoring import calibration, engine, index, search, store
from tasks.scoring.batching import Tokenized, batches
from tasks.scoring.bits import Agreement, pack, packed_bytes, planes, unpack
from tasks.scoring.build import append_index, build_index, build_indexes, query_index, scorer_of
from tasks.scoring.calibration import MedianBit
from tasks.scoring.config import FitConfig, RiseConfig, ScorerConfig, SketchConfig
from tasks.scoring.index import Index
from tasks.scoring.methods import Request, score_pool
from tasks.scoring.plan import pieces
from tasks.scoring.shards import IndexSpec
from tests.tiny import tiny_gpt_neox, tiny_llama

SKETCH = SketchConfig(kr=16, kh=6, kg=12)
D = SKETCH.dimension
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "quietly")
ROOT = Path(__file__).parents[2]


def rows(count: int, seed: int, prefix: str = "doc") -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    return [{"doc_id": f"{prefix}{i:03d}", "text": " ".join(rng.choice(WORDS, rng.integers(3, 14)))}
            for i in range(count)]  # fmt: skip


def parquet(path: Path, documents: list[dict[str, str]]) -> Path:
    pq.write_table(pa.Table.from_pylist(documents), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def scorer(model: Path) -> ScorerConfig:
    return ScorerConfig(model=str(model), batch_tokens=300, shard_tokens=500, precision="float32", threads=1)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents and one of a single token, whose signature is zero."""
    return parquet(tmp_path_factory.mktemp("pool") / "pool.parquet",
                   [*rows(40, 0), {"doc_id": "silent", "text": "x"}])  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, pool: Path, scorer: ScorerConfig) -> dict[str, Index]:
    """The pool's index in every type."""
    folder = tmp_path_factory.mktemp("built")
    for stored in ("fp32", "fp16", "int8", "bit"):
        build_index(pool, folder / stored, scorer, SKETCH, stored=stored)
    return {stored: Index(folder / stored) for stored in ("fp32", "fp16", "int8", "bit")}


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory, built: dict[str, Index]) -> Index:
    folder = tmp_path_factory.mktemp("queries")
    return query_index(built["bit"], parquet(folder / "q.parquet", rows(12, 1, "query")), folder / "index")


def by_id(whole: Index) -> dict[str, np.ndarray]:
    return dict(zip(whole.doc_ids, np.concatenate(list(whole.blocks())), strict=True))


def encoded(phi: np.ndarray, stored: str, fitted: MedianBit | None = None) -> store.Encoder:
    encoder = store.Encoder(len(phi), stored, fitted)
    for part in np.array_split(phi, min(len(phi), 3)):
        encoder.add(part)
    return encoder


def together(whole: Index) -> np.ndarray:
    return np.concatenate(list(whole.blocks()))


# Bits


@pytest.mark.parametrize("dimension", [1, 63, 64, 168, 6144])
def test_packed_bits_are_the_bits_and_agree_like_signs(dimension: int) -> None:
    rng = np.random.default_rng(dimension)
    left, right = rng.random((9, dimension)) < 0.5, rng.random((5, dimension)) < 0.5
    assert pack(left).shape == (9, packed_bytes(dimension))
    assert (unpack(pack(left), dimension) == left).all()
    signs_left, signs_right = (np.where(bits, 1, -1) for bits in (left, right))
    assert (Agreement(pack(right), dimension)(pack(left)) == signs_left @ signs_right.T).all()


@pytest.mark.parametrize("queries", [1, 2, 3, 4, 7, 8, 40, 63, 64, 100])
def test_bit_planes_sum_to_the_queries_exactly(queries: int) -> None:
    rng = np.random.default_rng(queries)
    asked, documents = rng.random((queries, 200)) < 0.4, rng.random((30, 200)) < 0.6
    plane_PB, weight_P = planes(pack(asked), 200)
    assert len(plane_PB) == min(queries, queries.bit_length() + 1)
    expected = np.where(documents, 1, -1) @ np.where(asked, 1, -1).T.sum(axis=1)
    assert (Agreement(plane_PB, 200)(pack(documents)) @ weight_P == expected).all()


def test_the_papers_size_at_one_bit_is_768_bytes_a_document(tmp_path: Path) -> None:
    assert SketchConfig().dimension == 6144
    sizes = [store.bytes_a_document(stored, 6144) for stored in ("fp32", "fp16", "int8", "bit")]
    assert sizes == [24_576, 12_288, 6_148, 768]
    phi = np.random.default_rng(0).normal(size=(50, 6144)).astype(np.float32)
    for count in (10, 50):
        index.write_shard(tmp_path, count, encoded=encoded(phi[:count], "bit", MedianBit(phi[0])),
                          doc_ids=[str(i) for i in range(count)], n_tokens=[2] * count)  # fmt: skip
    sizes = [(tmp_path / "shards" / f"{count:05d}.signatures.npy").stat().st_size for count in (10, 50)]
    assert sizes[1] - sizes[0] == 40 * 768


# Types


ERROR = {"fp32": 1e-6, "fp16": 1e-3, "int8": 0.03}
"""Length of the error over the signature's, at most."""


@pytest.mark.parametrize("stored", ERROR)
def test_a_type_keeps_the_signature_within_its_error(built: dict[str, Index], stored: str) -> None:
    assert built[stored].doc_ids == built["fp32"].doc_ids
    kept, exact = together(built[stored]), together(built["fp32"])
    assert (np.linalg.norm(kept - exact, axis=1) <= ERROR[stored] * np.linalg.norm(exact, axis=1)).all()
    assert not by_id(built[stored])["silent"].any()


def test_int8_keeps_small_values_that_a_linear_scale_would_lose() -> None:
    phi = np.array([[1.0, 1e-3, -1e-3, 0.0]], dtype=np.float32)
    kept = store.decode(store.encode(phi, "int8"), "int8", 4)
    assert np.abs(kept - phi).max() < 5e-4
    assert kept[0, 1] > 0 > kept[0, 2]
    assert kept[0, 3] == 0


def test_bits_are_the_signs_about_the_median(built: dict[str, Index]) -> None:
    exact, kept = by_id(built["fp32"]), by_id(built["bit"])
    speaking = np.stack([phi for phi in exact.values() if phi.any()])
    median = np.median(speaking, axis=0)
    fitted = built["bit"].calibration
    assert isinstance(fitted, MedianBit)
    np.testing.assert_allclose(fitted.median, median, atol=1e-6)
    for doc_id, phi in exact.items():
        expected = np.where(phi > fitted.median, 1, -1) / np.sqrt(D) if phi.any() else np.zeros(D)
        # A value that is the median itself may fall on either side when it comes out of another batch.
        clear = np.abs(phi - fitted.median) > 1e-6
        np.testing.assert_allclose(kept[doc_id][clear], expected[clear], atol=1e-6)
    assert set(np.unique(np.abs(kept["silent"]))) == {0.0}


# Calibration


def test_a_fit_is_given_signatures_and_nothing_else() -> None:
    assert list(inspect.signature(calibration.fit).parameters) == ["name", "blocks"]


@pytest.mark.parametrize(("stored", "name"), [("bit", "median-bit"), ("fp32", "power:0.3")])
def test_labels_ids_and_order_do_not_reach_a_fit(
    tmp_path: Path, scorer: ScorerConfig, stored: str, name: str
) -> None:
    """Other labels, other sources, another order: the same median, of the same sample."""
    documents = rows(30, 3)
    centers = []
    for i, seed in enumerate((0, 1)):
        rng = np.random.default_rng(seed)
        labelled = [{**row, "label": str(rng.choice(["control", "junk"])), "source": str(rng.integers(9))}
                    for row in documents]  # fmt: skip
        file = parquet(tmp_path / f"{i}.parquet", [labelled[j] for j in rng.permutation(30)])
        build_index(file, tmp_path / str(i), scorer, SKETCH, stored=stored, fit=FitConfig(name=name, documents=12))
        centers.append((tmp_path / str(i) / index.CALIBRATION).read_bytes())
    assert centers[0] == centers[1]


def test_the_sample_comes_from_the_texts_hash_and_its_seed(tmp_path: Path, scorer: ScorerConfig) -> None:
    """The same texts under other ids give the same median; another seed gives another."""
    documents = rows(30, 3)
    renamed = [{"doc_id": f"other{i}", "text": row["text"]} for i, row in enumerate(documents)]
    medians = []
    for i, (some, seed) in enumerate([(documents, 1), (renamed, 1), (documents, 2)]):
        build_index(parquet(tmp_path / f"{i}.parquet", some), tmp_path / str(i), scorer, SKETCH, stored="bit",
                    fit=FitConfig(documents=10, seed=seed))  # fmt: skip
        medians.append(center(Index(tmp_path / str(i))))
    np.testing.assert_allclose(medians[0], medians[1], atol=1e-6)
    assert np.abs(medians[0] - medians[2]).max() > 1e-3


def center(whole: Index) -> np.ndarray:
    return calibration.center(whole.calibration)


def test_the_median_in_columns_is_the_median() -> None:
    phi = np.random.default_rng(0).normal(size=(21, 1100)).astype(np.float32)
    phi[4] = 0.0
    fitted = calibration.fit("median-bit", np.array_split(phi, 4))
    np.testing.assert_array_equal(center_of(fitted), np.median(np.delete(phi, 4, 0), axis=0))
    assert not fitted.apply(phi)[4].any()
    np.testing.assert_allclose(np.linalg.norm(fitted.apply(phi[:4]), axis=1), 1.0, rtol=1e-5)


def center_of(fitted: calibration.Fitted) -> np.ndarray:
    return calibration.center(fitted)


def test_a_kept_calibration_is_the_one_fitted_on_the_whole_pool(
    tmp_path: Path, pool: Path, scorer: ScorerConfig, built: dict[str, Index], queries: Index
) -> None:
    build_index(pool, tmp_path / "kept", scorer, SKETCH, stored="fp32", fit=FitConfig(name="power:0.3"))
    kept = Index(tmp_path / "kept")
    assert kept.calibration_name == "power:0.3"
    np.testing.assert_allclose(center(kept), center_of(calibration.fit("power:0.3", built["fp32"].blocks())), atol=1e-6)
    ours, fitted_now = (search.score(whole, queries, calibrated="power:0.3") for whole in (kept, built["fp32"]))
    np.testing.assert_allclose(ours.mean, fitted_now.mean, atol=1e-6)


@pytest.mark.parametrize(("stored", "name"), [("bit", "center"), ("bit", "power:0.3"), ("bit", "none")])
def test_bits_go_with_no_other_calibration(built: dict[str, Index], queries: Index, stored: str, name: str) -> None:
    with pytest.raises(ValueError, match="median-bit"):
        RiseConfig(index_type=stored, calibration=name)
    with pytest.raises(InputError, match="median-bit"):
        search.score(built[stored], queries, calibrated=name)


def test_the_median_of_float_signatures_scores_as_bits_do(built: dict[str, Index], queries: Index) -> None:
    """Signs of fp32 signatures at scoring are the bits that an index of bits keeps: same fit, same scores."""
    kept = search.score(built["bit"], queries, calibrated="median-bit")
    now = search.score(built["fp32"], queries, calibrated="median-bit")
    now_of = dict(zip(now.doc_ids, now.mean, strict=True))
    np.testing.assert_allclose([now_of[doc_id] for doc_id in kept.doc_ids], kept.mean, atol=1e-5)
    hits = search.mean_pooled(built["fp32"], np.concatenate(list(queries.blocks())), 5,
                              fitted=search.fitted_for(built["fp32"], "median-bit"))  # fmt: skip
    assert [hit.doc_id for hit in hits] == sorted(now_of, key=lambda doc_id: (-now_of[doc_id], doc_id))[:5]


@pytest.mark.parametrize("name", ["none", "center", "power:0.3"])
@pytest.mark.parametrize("stored", ["fp16", "int8"])
def test_scores_of_a_type_are_those_of_fp32(built: dict[str, Index], queries: Index, stored: str, name: str) -> None:
    exact, ours = (search.score(built[t], queries, calibrated=name) for t in ("fp32", stored))
    assert ours.doc_ids == exact.doc_ids
    assert np.abs(ours.mean - exact.mean).max() < 0.01
    assert np.corrcoef(ours.mean, exact.mean)[0, 1] > 0.999


def test_scores_of_bits_are_cosines_of_signs(built: dict[str, Index], queries: Index) -> None:
    scores = search.score(built["bit"], queries, calibrated="median-bit")
    fitted = built["bit"].calibration
    expected = fitted.apply(together(queries)) @ together(built["bit"]).T
    np.testing.assert_allclose(scores.per_query, expected, atol=1e-5)
    np.testing.assert_allclose(scores.mean, expected.mean(axis=0), atol=1e-5)
    assert scores.mean[scores.doc_ids.index("silent")] == 0.0


def test_rise_scores_a_pool_in_bits(tmp_path: Path, pool: Path, scorer: ScorerConfig, built: dict[str, Index]) -> None:
    asked = parquet(tmp_path / "q.parquet", rows(12, 1, "query"))
    config = RiseConfig(sketch=SKETCH, index_type="bit", calibration="median-bit")
    scores = score_pool(config, Request(pool, asked, scorer, tmp_path / "work"))
    assert Index(tmp_path / "work" / "readout" / "queries").stored == "fp32"
    assert scores.doc_ids == built["bit"].doc_ids
    assert scores.per_query is not None
    np.testing.assert_allclose(scores.per_query.mean(axis=0), scores.mean, atol=1e-6)


# Building, killing, appending


def test_a_shard_read_in_pieces_has_the_batches_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    documents = Tokenized.of([str(i) for i in range(900)], [np.zeros(n, int) for n in rng.integers(2, 40, 900)])
    for places, batch_tokens in ((range(0, 900), 300), (range(3, 850), 7000), (range(5, 9), 1), (range(4, 5), 10)):
        cut = list(pieces(documents, places, batch_tokens))
        assert [batch for piece in cut for batch in batches(documents, piece, batch_tokens)] == batches(
            documents, places, batch_tokens)  # fmt: skip
        assert all(len(piece) <= 256 or len(batches(documents, piece, batch_tokens)) == 1 for piece in cut)


def test_two_processes_make_the_same_bits(tmp_path: Path, pool: Path, scorer: ScorerConfig) -> None:
    for processes in (1, 2):
        build_index(pool, tmp_path / str(processes), scorer.model_copy(update={"processes": processes}), SKETCH,
                    stored="bit", fit=FitConfig(documents=20))  # fmt: skip
    assert digest_directory(tmp_path / "1") == digest_directory(tmp_path / "2")
    assert not (tmp_path / "2" / "sample").exists()


def killed_after(call: str, shards: Path, count: int) -> None:
    """Run ``call`` with a pause after each shard and SIGKILL it when ``count`` are whole below ``shards``."""
    code = (
        "from pathlib import Path; import time, tasks.scoring.index as index\n"
        "from tasks.scoring.build import append_index, build_index, build_indexes\n"
        "from tasks.scoring.shards import IndexSpec\n"
        "from tasks.scoring.config import ScorerConfig, SketchConfig, FitConfig\n"
        "write = index.write_shard\n"
        "def slow(*args, **options):\n    write(*args, **options); time.sleep(0.3)\n"
        f"index.write_shard = slow\n{call}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(shards.glob("*.json"))) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(shards.glob("*.json"))) >= count


@pytest.mark.parametrize("where", ["sample/shards", "shards"])
def test_a_killed_build_of_bits_goes_on_at_its_shard(tmp_path: Path, scorer: ScorerConfig, where: str) -> None:
    """Killed while the sample is made, and while the others are: the same bytes as if it had not been."""
    file = parquet(tmp_path / "d.parquet", rows(60, 0))
    small = scorer.model_copy(update={"shard_tokens": 200})
    fit = FitConfig(documents=25)
    build_index(file, tmp_path / "alone", small, SKETCH, stored="bit", fit=fit)
    call = (f"build_index(Path({str(file)!r}), Path({str(tmp_path / 'killed')!r}), ScorerConfig(**{small.plain()!r}), "
            f"SketchConfig(**{SKETCH.plain()!r}), stored='bit', fit=FitConfig(**{fit.plain()!r}))")  # fmt: skip
    folder = tmp_path / "killed" / where
    killed_after(call, folder, 2)
    whole = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert len(whole) < len(Index(tmp_path / "alone").shards)
    assert (tmp_path / "killed" / index.CALIBRATION).exists() == (where == "shards")
    if where == "shards":
        build_index(file, tmp_path / "killed", small, SKETCH, stored="bit", fit=fit)
        assert {path: path.stat().st_mtime_ns for path in whole} == whole
    else:
        made = []
        write, index.write_shard = index.write_shard, lambda out, number, **how: (made.append(out), write(
            out, number, **how))  # fmt: skip
        try:
            build_index(file, tmp_path / "killed", small, SKETCH, stored="bit", fit=fit)
        finally:
            index.write_shard = write
        shards_of_sample = made.count(tmp_path / "killed" / "sample") + len(whole)
        assert 2 < shards_of_sample < len(Index(tmp_path / "alone").shards)
    assert digest_directory(tmp_path / "killed") == digest_directory(tmp_path / "alone")
    assert index.verify(tmp_path / "killed") == index.verify(tmp_path / "alone")


# Several indexes of one pass

SPECS: dict[str, dict[str, Any]] = {
    "paper": {}, "int8": {"stored": "int8"}, "weighted": {"sketch": {"alpha": 0.5}, "stored": "fp32"},
    "wider": {"sketch": {"kr": 20, "kh": 8, "kg": 9, "seed": 7}, "fit": {"name": "power:0.3"}},
    "warmer": {"sketch": {"tau": 1.5, "rho_cum": 0.5}, "stored": "int8", "fit": {"name": "median-bit"}},
    "losses": {"sketch": None},
}  # fmt: skip
"""What differs from an fp16 index of SKETCH."""


def spec(folder: Path, name: str) -> IndexSpec:
    given = {"sketch": {}, **SPECS[name]}
    sketch = None if given["sketch"] is None else SKETCH.model_copy(update=given["sketch"])
    fit = FitConfig(**given["fit"]) if "fit" in given else None
    return IndexSpec(folder / name, sketch, given.get("stored", "fp16"), fit)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, pool: Path, scorer: ScorerConfig) -> dict[str, dict[str, bytes]]:
    """The files of each of SPECS, built by a pass of its own."""
    folder = tmp_path_factory.mktemp("alone")
    for one in (spec(folder, name) for name in SPECS):
        build_index(pool, one.out, scorer, one.sketch, stored=one.stored, fit=one.fit, losses=True)
    return {name: contents(folder / name) for name in SPECS}


def contents(directory: Path) -> dict[str, bytes]:
    return {name: bytes_ for name, (bytes_, _) in files_of(directory).items()}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Documents and sketches of every call of the engine."""
    made: list[tuple[int, int]] = []
    forward = engine.forward
    monkeypatch.setattr(engine, "forward", lambda readout, documents, some, *, sketchers, **how: (
        made.append((len(some), len(sketchers))), forward(readout, documents, some, sketchers=sketchers, **how))[1])
    return made


def test_indexes_that_share_a_pass_have_the_bytes_of_their_own(
    tmp_path: Path, pool: Path, scorer: ScorerConfig, alone: dict[str, dict[str, bytes]], passes: list[tuple[int, int]]
) -> None:
    assert build_indexes(pool, [spec(tmp_path, name) for name in SPECS], scorer, losses=True) == 41
    assert {name: contents(tmp_path / name) for name in SPECS} == alone
    assert sum(documents for documents, _ in passes) == 41
    assert {sketches for _, sketches in passes} == {4}  # fp16 and int8 of one sketch share its signatures
    assert all(index.verify(tmp_path / name)[1] == 41 for name in SPECS)
    done = files_of(tmp_path)
    build_indexes(pool, [spec(tmp_path, name) for name in SPECS], scorer, losses=True)
    assert contents(tmp_path) == {name: bytes_ for name, (bytes_, _) in done.items()}
    assert sum(documents for documents, _ in passes) == 41


def test_two_processes_make_the_same_indexes(
    tmp_path: Path, pool: Path, scorer: ScorerConfig, alone: dict[str, dict[str, bytes]]
) -> None:
    two = scorer.model_copy(update={"processes": 2})
    build_indexes(pool, [spec(tmp_path, name) for name in SPECS], two, losses=True)
    assert {name: contents(tmp_path / name) for name in SPECS} == alone


def test_a_shard_is_made_again_for_the_indexes_that_lack_it(
    tmp_path: Path, pool: Path, scorer: ScorerConfig, alone: dict[str, dict[str, bytes]], passes: list[tuple[int, int]]
) -> None:
    """One index is whole, two lack one shard each, the others a third one."""
    build_indexes(pool, [spec(tmp_path, name) for name in SPECS], scorer, losses=True)
    shards = Index(tmp_path / "paper").shards
    assert len(shards) == 4
    lacking = {"int8": 0, "wider": 1, "weighted": 3, "warmer": 3, "losses": 3}
    for name, number in lacking.items():
        (tmp_path / name / "shards" / f"{number:05d}.json").unlink()
    times = {name: time_ for name, (_, time_) in files_of(tmp_path).items()}
    passes.clear()
    build_indexes(pool, [spec(tmp_path, name) for name in SPECS], scorer, losses=True)
    assert passes == [(len(shards[0]), 1), (len(shards[1]), 1), (len(shards[3]), 2)]
    assert {name: contents(tmp_path / name) for name in SPECS} == alone
    written = {name for name, (_, time_) in files_of(tmp_path).items() if times.get(name) != time_}
    assert {(name.split("/")[0], int(name.split("/")[2][:5])) for name in written if "/shards/" in name} == set(
        lacking.items())  # fmt: skip


def test_a_killed_build_of_several_goes_on(tmp_path: Path, scorer: ScorerConfig) -> None:
    """Killed between the writes of one shard or of two: the bytes are those of builds that were not."""
    file, small = parquet(tmp_path / "d.parquet", rows(40, 0)), scorer.model_copy(update={"shard_tokens": 200})
    names = ("paper", "weighted")
    for one in (spec(tmp_path / "alone", name) for name in names):
        build_index(file, one.out, small, one.sketch, stored=one.stored)
    specs = ", ".join(f"IndexSpec(Path({str(tmp_path / name)!r}), SketchConfig(**{one.sketch.plain()!r}), "
                      f"{one.stored!r})" for name in names if (one := spec(tmp_path, name)).sketch)  # fmt: skip
    killed_after(f"build_indexes(Path({str(file)!r}), [{specs}], ScorerConfig(**{small.plain()!r}))",
                 tmp_path / "weighted" / "shards", 2)  # fmt: skip
    kept = [path for name in names for path in (tmp_path / name / "shards").glob("*.json")]
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert 4 <= len(kept) < 2 * len(Index(tmp_path / "alone" / "paper").shards)
    build_indexes(file, [spec(tmp_path, name) for name in names], small)
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert [contents(tmp_path / name) for name in names] == [contents(tmp_path / "alone" / name) for name in names]


def test_what_cannot_share_a_pass_is_refused(tmp_path: Path, pool: Path, scorer: ScorerConfig) -> None:
    paper = spec(tmp_path, "paper")
    with pytest.raises(ValueError, match="an index of bits is built alone"):
        build_indexes(pool, [paper, IndexSpec(tmp_path / "bits", SKETCH, "bit")], scorer)
    with pytest.raises(ValueError, match="same directory"):
        build_indexes(pool, [paper, IndexSpec(tmp_path / "paper", SKETCH, "fp32")], scorer)
    with pytest.raises(ValueError, match="no index"):
        build_indexes(pool, [], scorer)
    assert not list(tmp_path.iterdir())


def files_of(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {path.relative_to(directory).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(directory.rglob("*")) if path.is_file()}  # fmt: skip


@pytest.mark.parametrize("stored", ["fp32", "int8", "bit"])
def test_an_append_is_the_build_of_both_and_touches_nothing_old(
    tmp_path: Path, scorer: ScorerConfig, queries: Index, stored: str
) -> None:
    old, new = rows(30, 0), rows(20, 5, "new")
    build_index(parquet(tmp_path / "old.parquet", old), tmp_path / "index", scorer, SKETCH, stored=stored)
    before = files_of(tmp_path / "index")
    added = append_index(parquet(tmp_path / "new.parquet", new), tmp_path / "index", scorer)
    after = files_of(tmp_path / "index")
    assert added == 20
    assert {name: after[name] for name in before if name != index.MANIFEST} == {
        name: entry for name, entry in before.items() if name != index.MANIFEST}  # fmt: skip
    assert index.verify(tmp_path / "index")[1] == 50
    grown = Index(tmp_path / "index")
    assert [batch["documents"] for batch in grown.manifest["batches"]] == [30, 20]
    assert sum(batch["shards"] for batch in grown.manifest["batches"]) == len(grown.shards)
    assert len({batch["data"] for batch in grown.manifest["batches"]}) == 2

    build_index(parquet(tmp_path / "both.parquet", old + new), tmp_path / "both", scorer, SKETCH, stored="fp32")
    exact = by_id(Index(tmp_path / "both"))
    name = "median-bit" if stored == "bit" else "none"
    ours = search.score(grown, queries, calibrated=name)
    if stored == "bit":
        # The median stays the one of the build, for old and new documents and for queries.
        fitted = Index(tmp_path / "index").calibration
        build_index(tmp_path / "old.parquet", tmp_path / "first", scorer, SKETCH, stored="bit")
        np.testing.assert_array_equal(center_of(fitted), center(Index(tmp_path / "first")))
        exact = {doc_id: fitted.apply(phi[None])[0] for doc_id, phi in exact.items()}
        query_QD = fitted.apply(together(queries))
    else:
        query_QD = together(queries)
    expected = dict(zip(exact, (np.stack(list(exact.values())) @ query_QD.T).mean(axis=1), strict=True))
    assert sorted(ours.doc_ids) == sorted(expected)
    tolerance = {"fp32": 1e-5, "int8": 0.01, "bit": 4 / D}[stored]
    for doc_id, mean in zip(ours.doc_ids, ours.mean, strict=True):
        assert mean == pytest.approx(expected[doc_id], abs=tolerance)


def test_a_killed_append_goes_on_and_the_old_index_stays_readable(tmp_path: Path, scorer: ScorerConfig) -> None:
    small = scorer.model_copy(update={"shard_tokens": 200})
    old, new = parquet(tmp_path / "old.parquet", rows(20, 0)), parquet(tmp_path / "new.parquet", rows(40, 5, "new"))
    for name in ("alone", "killed"):
        build_index(old, tmp_path / name, small, SKETCH, stored="bit")
    append_index(new, tmp_path / "alone", small)
    first = len(Index(tmp_path / "killed").shards)
    call = (f"append_index(Path({str(new)!r}), Path({str(tmp_path / 'killed')!r}), "
            f"ScorerConfig(**{small.plain()!r}))")  # fmt: skip
    killed_after(call, tmp_path / "killed" / "shards", first + 2)
    assert index.verify(tmp_path / "killed") == (first, 20)
    whole = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "shards").glob("*.json")}

    other = parquet(tmp_path / "other.parquet", rows(5, 6, "other"))
    with pytest.raises(InputError, match=r"append\.json: other documents are being added"):
        append_index(other, tmp_path / "killed", small)
    append_index(new, tmp_path / "killed", small)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    assert digest_directory(tmp_path / "killed") == digest_directory(tmp_path / "alone")
    assert read_json(tmp_path / "killed" / "manifest.json") == read_json(tmp_path / "alone" / "manifest.json")
    assert not (tmp_path / "killed" / "append.json").exists()


def test_an_append_that_is_given_up_leaves_nothing(tmp_path: Path, scorer: ScorerConfig) -> None:
    build_index(parquet(tmp_path / "old.parquet", rows(20, 0)), tmp_path / "index", scorer, SKETCH)
    first = len(Index(tmp_path / "index").shards)
    for number in range(first, first + 5):  # as an append of more documents would have left them
        index.write_shard(tmp_path / "index", number, encoded=encoded(np.ones((1, D), np.float32), "fp16"),
                          doc_ids=[f"gone{number}"], n_tokens=[2])  # fmt: skip
    append_index(parquet(tmp_path / "new.parquet", rows(5, 6, "new")), tmp_path / "index", scorer)
    assert index.verify(tmp_path / "index")[1] == 25
    assert not any(doc_id.startswith("gone") for doc_id in Index(tmp_path / "index").doc_ids)
    assert len(list((tmp_path / "index" / "shards").glob("*.json"))) == len(Index(tmp_path / "index").shards)


def test_what_does_not_belong_is_refused(tmp_path: Path, scorer: ScorerConfig, pool: Path) -> None:
    out = tmp_path / "index"
    build_index(pool, out, scorer, SKETCH, stored="bit")
    before = files_of(out)
    with pytest.raises(InputError, match=r"made with calibration = .*, not None"):
        build_index(pool, out, scorer, SKETCH)
    with pytest.raises(InputError, match="made with sketch"):
        build_index(pool, out, scorer, SKETCH.model_copy(update={"kr": 8}), stored="bit")
    with pytest.raises(InputError, match="made with calibration"):
        build_index(pool, out, scorer, SKETCH, stored="bit", fit=FitConfig(documents=7))
    with pytest.raises(InputError, match="made with documents"):
        build_index(parquet(tmp_path / "a.parquet", rows(3, 9, "a")), out, scorer, SKETCH, stored="bit")
    with pytest.raises(InputError, match="holds the document doc007 already"):
        append_index(parquet(tmp_path / "b.parquet", [*rows(3, 9, "b"), rows(8, 0)[7]]), out, scorer)
    other = tiny_gpt_neox(tmp_path / "neox")
    new = parquet(tmp_path / "c.parquet", rows(3, 9, "c"))
    with pytest.raises(InputError, match="made with model"):
        append_index(new, out, scorer.model_copy(update={"model": str(other)}))
    with pytest.raises(InputError, match="made with max_length = 512, not 64"):
        append_index(new, out, scorer.model_copy(update={"max_length": 64}))
    with pytest.raises(InputError, match="is not the model"):
        scorer_of(Index(out), model=str(other))
    assert files_of(out) == before


def test_building_a_whole_index_again_keeps_what_was_added(tmp_path: Path, scorer: ScorerConfig, pool: Path) -> None:
    build_index(pool, tmp_path / "index", scorer, SKETCH)
    append_index(parquet(tmp_path / "new.parquet", rows(5, 6, "new")), tmp_path / "index", scorer)
    before = files_of(tmp_path / "index")
    build_index(pool, tmp_path / "index", scorer, SKETCH)
    assert {name: bytes_ for name, (bytes_, _) in files_of(tmp_path / "index").items()} == {
        name: bytes_ for name, (bytes_, _) in before.items()}  # fmt: skip


# Corruption


@pytest.fixture
def small(tmp_path: Path, scorer: ScorerConfig) -> Path:
    """An index of bits in two shards or more, with an appended one."""
    build_index(parquet(tmp_path / "old.parquet", rows(12, 0)), tmp_path / "index", scorer, SKETCH, stored="bit")
    append_index(parquet(tmp_path / "new.parquet", rows(5, 6, "new")), tmp_path / "index", scorer)
    return tmp_path / "index"


def everything(whole: Index, query_QD: np.ndarray) -> None:
    search.per_query(whole, query_QD, 3)
    assert whole.doc_ids


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_damage_is_found_by_verify_and_by_the_reader(small: Path, damage: str) -> None:
    query_QD = np.random.default_rng(0).normal(size=(2, D)).astype(np.float32)
    everything(Index(small), query_QD)
    names = [name for name in files_of(small) if name != ".lock"]
    assert {"calibration.npy", "manifest.json", "plan.json", "shards/00000.signatures.npy"} < set(names)
    for name in names:
        path = small / name
        kept = path.read_bytes()
        middle = len(kept) // 2
        if damage == "lose":
            path.unlink()
        else:
            path.write_bytes(kept[:middle] + bytes([kept[middle] ^ 1]) + kept[middle + 1 :] if damage == "flip"
                             else kept[:-1] if path.suffix != ".json" else kept[:-3])  # fmt: skip
        with pytest.raises(InputError) as found:
            index.verify(small)
        assert found.value.file == str(path) or (name, damage) == ("manifest.json", "lose")
        if not name.endswith(".json") or name == "manifest.json":
            with pytest.raises(InputError):
                everything(Index(small), query_QD)
        path.write_bytes(kept)
    everything(Index(small), query_QD)


def test_a_reader_checks_a_file_once_and_only_if_asked(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    real = index.sha256_file
    monkeypatch.setattr(index, "sha256_file", lambda path: (checked.append(path.name), real(path))[1])
    whole = Index(small)
    for _ in range(2):
        together(whole)
    assert sorted(checked) == [f"{shard.number:05d}.signatures.npy" for shard in whole.shards]
    together(Index(small, verify=False))
    assert len(checked) == len(whole.shards)


# Search


def random_index(out: Path, stored: str, count: int, *, shard: int = 37, copies: int = 1, dimension: int = D) -> Index:
    """Random signatures, each ``copies`` times, under ids that are not in the order of the places."""
    rng = np.random.default_rng(count)
    phi = np.repeat(rng.normal(size=(-(-count // copies), dimension)).astype(np.float32), copies, axis=0)[:count]
    phi /= np.linalg.norm(phi, axis=1, keepdims=True)
    phi[count // 3] = 0.0
    ids = [f"d{place:05d}" for place in rng.permutation(count)]
    index.begin(out, {"sketch": SKETCH.plain(), "type": stored, "model": "m", "losses": False,
                      **({"calibration": FitConfig().plain()} if stored == "bit" else {})})  # fmt: skip
    fitted = calibration.fit("median-bit", [phi[: count // 2]])
    assert isinstance(fitted, MedianBit)
    if stored == "bit":
        index.write_calibration(out, fitted)
    starts = range(0, count, shard)
    for number, start in enumerate(starts):
        part = slice(start, min(start + shard, count))
        index.write_shard(out, number, encoded=encoded(phi[part], stored, fitted), doc_ids=ids[part],
                          n_tokens=[5] * len(ids[part]))  # fmt: skip
    index.finish(out, 0, len(starts), made_of={"data": "d", "scorer": {"model": "m", "revision": None}})
    return Index(out)


@pytest.mark.parametrize("top", [1, 10, 5000])
@pytest.mark.parametrize(("stored", "copies"), [("bit", 1), ("bit", 25), ("fp32", 1), ("int8", 1)])
def test_search_is_the_head_of_the_full_ranking(tmp_path: Path, stored: str, copies: int, top: int) -> None:
    whole = random_index(tmp_path / "pool", stored, 1000, copies=copies)
    query_QD = np.random.default_rng(7).normal(size=(9, D)).astype(np.float32)
    query_QD[4] = 0.0
    fitted = whole.calibration
    decoded = together(whole)
    product_QN = (fitted.apply(query_QD).astype(np.float64) @ decoded.astype(np.float64).T)
    if stored == "bit":
        product_QN = np.rint(product_QN * D) / D  # whole numbers over D: ties are exact
    for exact_N, hits in [*zip(product_QN, search.per_query(whole, query_QD, top), strict=True),
                          (product_QN.mean(axis=0), search.mean_pooled(whole, query_QD, top))]:  # fmt: skip
        exact = dict(zip(whole.doc_ids, exact_N.tolist(), strict=True))
        assert len(hits) == min(top, 1000)
        for hit in hits:
            assert hit.score == pytest.approx(exact[hit.doc_id], abs=1e-5)
            assert whole.doc_ids[hit.place] == hit.doc_id
        if stored == "bit":
            order = sorted(exact, key=lambda doc_id: (-round(exact[doc_id], 9), doc_id))
            assert [hit.doc_id for hit in hits] == order[:top]
        elif top < 1000:
            assert min(hit.score for hit in hits) >= sorted(exact_N)[-top] - 1e-5


def test_where_all_documents_tie_the_ids_decide_and_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = random_index(tmp_path / "pool", "bit", 6000, shard=500, copies=6000)
    held: list[int] = []
    add = search._Best.add
    monkeypatch.setattr(search._Best, "add", lambda self, found: (add(self, found), held.append(self._count))[0])
    hits = search.mean_pooled(whole, np.full((1, D), -1.0, np.float32), 5)  # every bit is 0, as the documents' are
    silent = whole.doc_ids[2000]
    assert [hit.doc_id for hit in hits] == [doc_id for doc_id in sorted(whole.doc_ids) if doc_id != silent][:5]
    assert {hit.score for hit in hits} == {1.0}
    assert max(held) <= 8 * 5 + 4096


def test_channels_sum_to_the_score(built: dict[str, Index], queries: Index) -> None:
    for stored in ("fp32", "bit"):
        hits = search.mean_pooled(built[stored], together(queries), 7)
        parts = search.channels(built[stored], together(queries), hits)
        np.testing.assert_allclose(parts.sum(axis=1), [hit.score for hit in hits], atol=1e-6)
    phi, query = by_id(built["fp32"]), together(queries).mean(axis=0)
    hits = search.mean_pooled(built["fp32"], together(queries), 3)
    cut = SKETCH.kr * SKETCH.kh
    for hit, (rh, gh, mh) in zip(hits, search.channels(built["fp32"], together(queries), hits), strict=True):
        assert rh == pytest.approx(phi[hit.doc_id][:cut] @ query[:cut], abs=1e-6)
        assert gh == pytest.approx(phi[hit.doc_id][cut:] @ query[cut:], abs=1e-6)
        assert mh == 0


# The command line


def rise(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip


def jsonl(path: Path, documents: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"id": row["doc_id"], "text": row["text"]}) + "\n" for row in documents))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder with an index of bits that the command line built and added to, and the files it came from."""
    folder = tmp_path_factory.mktemp("made")
    jsonl(folder / "a.jsonl", [*rows(15, 0), {"doc_id": "bell", "text": "ring\x1b[31m the\nbell \u202e" + "x" * 90}])
    jsonl(folder / "b.jsonl", rows(6, 5, "new"))
    done = rise("index", "build", "--model", model, "--data", folder / "a.jsonl", "--out", folder / "index", "--dtype",
                "bit", "--kr", 16, "--kh", 6, "--kg", 12, "--precision", "float32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"16 documents in the index {folder / 'index'}"
    done = rise("index", "append", folder / "index", "--data", folder / "b.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 documents added; 22 in the index")
    return folder


def test_info_and_verify_say_what_is_there(made: Path, model: Path) -> None:
    done = rise("index", "info", made / "index")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["documents"].startswith("22 in ")
    assert lines["signatures"].startswith("bit, 24 bytes a document")
    assert "median-bit" in lines["calibration"]
    assert str(model) in lines["model"]
    done = rise("index", "verify", made / "index")
    shards = len(Index(made / "index").shards)
    assert (done.returncode, done.stdout) == (0, f"{shards} shards, 22 documents whole\n")


def test_what_a_killed_writer_left_is_gone_when_the_next_one_has_ended(made: Path, model: Path, tmp_path: Path) -> None:
    """A part has the number of the process that wrote it: who goes on writes another, and never over it."""
    out, other = tmp_path / "index", tmp_path / "int8"
    sketch = ["--kr", 16, "--kh", 6, "--kg", 12, "--precision", "float32"]
    for written, command in (
        (out, ["index", "build", "--model", model, "--data", made / "a.jsonl", "--out", out, *sketch]),
        (out, ["index", "append", out, "--data", made / "b.jsonl"]),
        (other, ["index", "convert", out, "--out", other, "--dtype", "int8"]),
    ):
        if written == other or "build" in command:  # begun, and killed as the first shard's entry was written
            assert rise(*command).returncode == 0
            (written / "manifest.json").unlink()
            (written / "shards" / "00000.json").unlink()
        part = written / "shards" / ".00000.documents.parquet.4711.part"
        part.write_bytes(b"PAR1")
        done = rise(*command)
        assert done.returncode == 0, done.stderr
        assert not part.exists(), command
        assert rise("index", "verify", written).returncode == 0


def test_attribute_ranks_the_documents_and_shows_no_control_character(made: Path, tmp_path: Path) -> None:
    done = rise("attribute", "--index", made / "index", "--text", "seven wizards box", "--top", 22, "--data",
                made / "a.jsonl", "--data", made / "b.jsonl", "--out", tmp_path / "o.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["rank", "score", "RH", "GH", "document"]
    assert [int(line.split()[0]) for line in lines] == list(range(1, 23))
    assert "\x1b" not in done.stdout
    assert "ring\\x1b[31m the\\nbell \\u202e" in done.stdout
    found = read_json(tmp_path / "o.json")
    ranking = found["ranking"]
    assert [row["score"] for row in ranking] == sorted((row["score"] for row in ranking), reverse=True)
    assert all(row["rh"] + row["gh"] == pytest.approx(row["score"], abs=1e-6) for row in ranking)
    assert {len(row["text"]) <= 80 for row in ranking if row["doc_id"] != "bell"} == {True}
    assert [row["doc_id"] for row in found["per_query"][0]["ranking"]] == [row["doc_id"] for row in ranking]


def test_attribute_finds_the_text_itself_first(made: Path) -> None:
    """A document's own text as the query: no other document can agree with more bits."""
    text = rows(15, 0)[3]["text"]
    done = rise("attribute", "--index", made / "index", "--text", text, "--top", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[4] == "doc003"


BAD = {
    "no index": (["attribute", "--index", "none", "--text", "a b"], "none: holds no whole index"),
    "no query": (["attribute", "--index", "{index}"], "either --text or --queries"),
    "both": (["attribute", "--index", "{index}", "--text", "a b", "--queries", "q.jsonl"], "either --text or"),
    "one token": (["attribute", "--index", "{index}", "--text", "a"], "field text"),
    "empty text": (["attribute", "--index", "{index}", "--text", "  "], "--text is empty"),
    "calibration": (["attribute", "--index", "{index}", "--text", "a b", "--calibration", "center"], "median-bit"),
    "another model": (["attribute", "--index", "{index}", "--text", "a b", "--model", "{neox}"], "is not the model"),
    "known id": (["index", "append", "{index}", "--data", "{a}"], "holds the document"),
    "not an index": (["index", "build", "--model", "{model}", "--data", "{a}", "--out", "."], "neither empty nor an"),
    "bits centred": (["index", "build", "--model", "{model}", "--data", "{a}", "--out", "o", "--dtype", "bit",
                      "--calibration", "center"], "median-bit"),
    "bits uncalibrated": (["index", "build", "--model", "{model}", "--data", "{a}", "--out", "o", "--dtype", "bit",
                           "--calibration", "none"], "median-bit"),
    "no calibration": (["index", "build", "--model", "{model}", "--data", "{a}", "--out", "o", "--calibration",
                        "power:2"], "field name"),
    "verify nothing": (["index", "verify", "none"], "none: holds no whole index"),
}  # fmt: skip


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt_neox(tmp_path_factory.mktemp("neox"))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2(name: str, made: Path, model: Path, neox: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"text": "a b"}\n')
    arguments, expected = BAD[name]
    places = {"index": made / "index", "a": made / "a.jsonl", "model": model, "neox": neox}
    done = rise(*(argument.format(**places) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    *progress, line = done.stderr.strip().splitlines()
    assert line.startswith("rise: ")
    assert expected in line
    assert not any("rise" in before or "Traceback" in before for before in progress), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_verify_names_a_flipped_byte_and_exits_2(small: Path) -> None:
    path = small / "shards" / "00000.signatures.npy"
    kept = bytearray(path.read_bytes())
    kept[-1] ^= 1
    path.write_bytes(bytes(kept))
    done = rise("index", "verify", small)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"rise: {path}: is damaged")
    assert len(done.stderr.strip().splitlines()) == 1
