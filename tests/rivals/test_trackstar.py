"""TrackStar against autograd, and against bergson's own pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.models import load_causal_lm, load_tokenizer, locate
from tasks.common.stage import digest_directory
from tasks.scoring.batching import tokenize
from tasks.scoring.config import TrackStarConfig
from tasks.scoring.methods import Request
from tasks.scoring.rivals import trackstar
from tasks.scoring.rivals.gradients import document_gradient
from tasks.scoring.rivals.trackstar import trackstar_scores
from tests.rivals.conftest import turned

pytestmark = pytest.mark.rivals
pytest.importorskip("bergson", reason="the extra rivals and bergson are not installed")
BASE = TrackStarConfig(unit_normalize=False, hessian=False, token_batch_size=256)


def autograd(request: Request, file: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Ids, and the gradient of every document's mean loss with regard to all linear weights but the head's, (N, F)."""
    located = locate(request.scorer.model)
    model = load_causal_lm(located, dtype=torch.float32)
    weights = [module.weight for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    model.requires_grad_(True)
    rows = pq.read_table(file).to_pylist()
    tokens = tokenize(load_tokenizer(located), [row["doc_id"] for row in rows], [row["text"] for row in rows], 200)
    gradient = [torch.cat([part.flatten() for part in document_gradient(model, weights, tokens.ids(place))]).numpy()
                for place in range(len(tokens))]  # fmt: skip
    return list(tokens.doc_ids), np.stack(gradient)


def test_unprojected_products_are_those_of_autograd(asked: Request) -> None:
    whole = BASE.model_copy(update={"projection_dim": 0})
    doc_ids, query_ids, scores = trackstar_scores(whole, asked)
    (pool_ids, pool), (queries, query) = (autograd(asked, file) for file in (asked.pool, asked.queries))
    assert (doc_ids, query_ids) == (pool_ids, queries)
    expected = query @ pool.T
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(scores, expected, atol=1e-4 * np.abs(expected).max())
    assert not scores[:, doc_ids.index("doc124")].any()  # one token: no gradient
    assert np.count_nonzero(scores) == 4 * 23


def test_projected_products_are_those_of_the_projected_gradients(asked: Request) -> None:
    from bergson.collector.collector import create_module_projection_matrix

    scores = trackstar_scores(BASE.model_copy(update={"projection_dim": 8}), asked)[2]
    model = load_causal_lm(locate(asked.scorer.model), dtype=torch.float32)
    layers = [(name, module.weight.shape) for name, module in model.base_model.named_modules()
              if isinstance(module, torch.nn.Linear)]  # fmt: skip

    def projected(gradient_NF: NDArray[np.float32]) -> NDArray[np.float32]:
        parts, start = [], 0
        for name, (outputs, inputs) in layers:
            weight = gradient_NF[:, start : start + outputs * inputs].reshape(-1, outputs, inputs)
            left, right = (create_module_projection_matrix(name, side, 8, size, torch.float32, torch.device("cpu"),
                                                           "rademacher", "jl", BASE.seed).numpy()
                           for side, size in (("left", outputs), ("right", inputs)))  # fmt: skip
            parts.append((left @ weight @ right.T).reshape(len(weight), -1))
            start += outputs * inputs
        return np.concatenate(parts, axis=1)

    pool, query = (projected(autograd(asked, file)[1]) for file in (asked.pool, asked.queries))
    np.testing.assert_allclose(scores, query @ pool.T, atol=1e-4 * np.abs(scores).max())
    kept = [np.array(trackstar.gradients(asked.work / "index", name)) for name in trackstar.SIDES]
    for calibration in ("none", "center"):
        config = TrackStarConfig(hessian=False, calibration=calibration)
        mean = kept[0] / np.linalg.norm(kept[0], axis=1, keepdims=True)
        mean = mean.mean(axis=0) * (calibration == "center")
        sides = [side / np.linalg.norm(side, axis=1, keepdims=True) - mean for side in kept]
        pool, query = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
        np.testing.assert_allclose(trackstar.products(config, asked.work / "index"), query @ pool.T, atol=1e-5)


PIPELINE = """
import json, sys
from pathlib import Path
import numpy as np
from bergson.cli.trackstar import trackstar
from bergson.config.config import PreprocessConfig, QuerySetConfig, TrackstarConfig
from bergson.data import load_scores
from tasks.scoring.rivals.trackstar import index_config

if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    library = Path(given["library"])
    trackstar(index_config(given, library / "pool.hf", library / "whole"),
              TrackstarConfig(query=QuerySetConfig(dataset=str(library / "queries.hf")),
                              preprocess_cfg=PreprocessConfig(unit_normalize=given["config"]["unit_normalize"])))
    np.save(library / "scores.npy", load_scores(library / "whole" / "scores")[:])
"""


@pytest.mark.parametrize("unit", [False, True])
def test_with_the_hessian_it_is_bergsons_own_pipeline(asked: Request, tmp_path: Path, unit: bool) -> None:
    config = TrackStarConfig(unit_normalize=unit, projection_dim=4, token_batch_size=256)
    doc_ids, query_ids, scores = trackstar_scores(config, asked)
    located = locate(asked.scorer.model)
    ids = {}
    for name, file in (("pool", asked.pool), ("queries", asked.queries)):
        rows = pq.read_table(file).to_pylist()
        tokens = tokenize(load_tokenizer(located), [row["doc_id"] for row in rows], [row["text"] for row in rows], 200)
        places = [place for place in range(len(tokens)) if tokens.length(place) > 1]
        trackstar.write_dataset([tokens.ids(place) for place in places], tmp_path / f"{name}.hf")
        ids[name] = [tokens.doc_ids[place] for place in places]
    given = {"config": config.plain(), "model": str(located.path), "precision": "fp32", "processes": 1,
             "library": str(tmp_path)}  # fmt: skip
    (tmp_path / "given.json").write_text(json.dumps(given))
    (tmp_path / "run.py").write_text(PIPELINE)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    subprocess.run([sys.executable, str(tmp_path / "run.py"), str(tmp_path / "given.json")], check=True, timeout=300,
                   env={**os.environ, "PYTHONPATH": path}, capture_output=True)  # fmt: skip
    theirs = np.load(tmp_path / "scores.npy").T
    ours = scores[np.ix_([query_ids.index(one) for one in ids["queries"]], [doc_ids.index(one) for one in ids["pool"]])]
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_order_and_interruptions_change_nothing(
    asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrackStarConfig(projection_dim=4, token_batch_size=256, hessian_documents=10)
    forth, back = trackstar_scores(config, asked), trackstar_scores(config, turned(asked, tmp_path / "turned"))
    assert forth[:2] == back[:2]
    assert (forth[2] == back[2]).all()
    assert np.unique(forth[2]).size > 50
    index = asked.work / "index"
    assert digest_directory(index) == digest_directory(tmp_path / "turned" / "work" / "index")
    assert sorted(str(file.relative_to(asked.work)) for file in asked.work.rglob("*") if file.is_file()) == [
        "index/inverse.npy", "index/modules.json", "index/plan.json", "index/pool/gradients.bin",
        "index/queries/gradients.bin"]  # fmt: skip
    pool = index / "pool" / "gradients.bin"
    assert pool.stat().st_size == 23 * 8 * 4 * 4 * 4
    # What a call leaves that was killed while it made the queries' gradients.
    (index / "queries" / "gradients.bin").unlink()
    (index / "inverse.npy").unlink()
    (asked.work / "bergson" / "queries.part").mkdir(parents=True)
    before = pool.stat().st_mtime_ns
    assert (trackstar_scores(config, asked)[2] == forth[2]).all()
    assert pool.stat().st_mtime_ns == before
    monkeypatch.setattr(trackstar, "run_child", None)
    assert (trackstar_scores(config, asked)[2] == forth[2]).all()


def test_a_batch_beyond_the_scorers_positions_is_refused(asked: Request) -> None:
    with pytest.raises(InputError, match=r"field token_batch_size.* here 256, got 1024"):
        trackstar_scores(TrackStarConfig(), asked)
    with pytest.raises(InputError, match=r"a document has .* tokens and a batch 8"):
        trackstar_scores(TrackStarConfig(token_batch_size=8), asked)


def test_what_bergson_says_ends_in_one_line_and_a_log(asked: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackstar, "write_tokens", lambda documents, rows, file: file.parent.mkdir(exist_ok=True))
    with pytest.raises(RuntimeError, match=r"^gradients failed: .*\(its log: .*bergson.log\)$"):
        trackstar_scores(BASE, asked)
    assert "Traceback" in (asked.work / "bergson.log").read_text()
