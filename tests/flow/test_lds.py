"""The linear datamodeling score from the command line: killed, finished, made again, refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tasks.common.files import read_json, write_json
from tasks.common.stage import Ref
from tasks.selection.datamodeling import half
from tests.flow.conftest import REPOSITORY
from tests.flow.test_study import pool_fields
from tests.tiny import tiny_llama

METHODS = {"random": {"method": "random"}, "hidden": {"method": "hidden"},
           "rise": {"method": "rise", "sketch": {"kr": 16, "kh": 6, "kg": 12}}}  # fmt: skip


@pytest.fixture(scope="session")
def lds_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three halves of a pool of 20 documents, two seeds."""
    folder = tmp_path_factory.mktemp("lds")
    values = {
        "name": "tiny-lds", "methods": METHODS, "subsets": 3, "training_seeds": [1, 2], "resamples": 50,
        "scorer": {"model": str(tiny_llama(folder / "scorer")), "precision": "float32", "max_length": 32,
                   "batch_tokens": 512},
        "pools": {"brainrot": {"task": "Brain Rot", "split": "heldout", "ks": [2, 5],
                               "pool": {**pool_fields(folder, "pool", 40, "tango"), "size": 20, "queries": 3}}},
        "finetuning": {"precision": "float32", "epochs": 2, "batch_size": 5, "max_length": 32, "learning_rate": 0.01},
    }  # fmt: skip
    path = folder / "lds.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_killed_it_goes_on_by_subset_and_ends_the_same(
    lds_conf: Path, server: dict[str, str], tmp_path: Path, rise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, halves = tmp_path / "run", tmp_path / "run" / "pretraining"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "flows.cli", "lds", str(lds_conf), "--out", str(out)],
                                   env=server, cwd=REPOSITORY, stdout=log, stderr=log,
                                   start_new_session=True)  # fmt: skip
    while process.poll() is None and len(list(halves.glob("*/manifest.json"))) < 2:
        time.sleep(0.01)
    assert process.poll() is None, (tmp_path / "log").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    whole = {path: path.stat().st_mtime_ns for path in out.glob("*/*/manifest.json")}
    assert 2 <= len([path for path in whole if path.is_relative_to(halves)]) < 6
    assert not (out / "lds.parquet").exists()

    done = rise("lds", lds_conf, "--out", out)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in whole} == whole, "nothing whole was made again"
    assert sorted(path.name for path in halves.iterdir()) == [
        f"brainrot.half{subset:03}@{seed}" for subset in range(3) for seed in (1, 2)]  # fmt: skip
    assert not list(out.rglob("*.safetensors")), "no weights are kept"
    _check_the_files(out, done.stdout)

    _check_that_a_training_is_whole_or_absent(lds_conf, out, tmp_path, monkeypatch)
    refused = rise("lds", lds_conf, "--out", out, "--set", "subsets=4")
    assert refused.returncode == 2
    assert "field subsets" in refused.stderr


def _check_that_a_training_is_whole_or_absent(
    conf: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import lds
    from flows.lds_config import load

    monkeypatch.setattr(lds, "reporter", lambda what: lambda share: None)
    config, stages = load(conf), read_json(out / "manifest.json")["stages"]
    assert config.finetuning is not None
    recipe = config.finetuning.model_copy(update={"seed": 2})

    def retrain(directory: Path) -> Ref:
        made: Ref = lds.retrain.fn(recipe, config.scorer, Ref(**stages["pool/brainrot"]), str(directory), subset=1,
                                   seed=42, arm="alone")  # fmt: skip
        return made

    alone, wanted = retrain(tmp_path / "alone"), stages["pretraining/brainrot.half001@2"]
    assert (alone.key, alone.digest) == (wanted["key"], wanted["digest"]), "the same whatever was trained before it"

    # Killed while it removed its weights: the NLLs stand, what is left of the training is no reason to train again.
    halfway = tmp_path / "late.partial"
    (halfway / "training" / "model").mkdir(parents=True)
    write_json(halfway / "work.json", {"key": alone.key})
    shutil.copy(alone.dir / lds.NLL, halfway)
    monkeypatch.setattr(lds, "train", None)
    assert retrain(tmp_path / "late").digest == alone.digest
    assert not (tmp_path / "late" / "training").exists()


def _check_the_files(out: Path, printed: str) -> None:
    rows = pq.read_table(out / "lds.parquet").to_pylist()
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert (row["queries"], row["subsets"], row["pool"], row["paradigm"]) == (3, 3, "brainrot", "predict")
        assert -1 <= row["low"] <= row["high"] <= 1
        assert f"{row['lds']:.3f}" in printed
    assert len({row["lds"] for row in rows}) > 1
    nlls = pq.read_table(out / "nlls.parquet")
    nll_SRQ = nlls["nll"].to_numpy().reshape(3, 2, 3)
    assert nlls["subset"].to_pylist() == [subset for subset in range(3) for _ in range(6)]
    assert np.isfinite(nll_SRQ).all()
    assert len(np.unique(nll_SRQ)) == 18, "every training gives its own"
    # Random looks at no query: its LDS from its scores and the NLLs alone.
    scores = pq.read_table(out / "scoring" / "predict.brainrot.random" / "scores.parquet").sort_by("doc_id")
    sums = [scores["score"].to_numpy()[half(20, subset, 42)].sum() for subset in range(3)]
    ranks = np.argsort(np.argsort(sums))
    wanted = [np.corrcoef(ranks, np.argsort(np.argsort(-nll_SRQ.mean(axis=1)[:, query])))[0, 1] for query in range(3)]
    assert rows[0]["lds"] == pytest.approx(np.mean(wanted))
    assert (out / "lds.txt").read_text().strip() in printed
    assert "ceiling" in printed


def test_a_bad_configuration_is_one_line(lds_conf: Path, tmp_path: Path, rise: Any) -> None:
    done = rise("lds", lds_conf, "--out", tmp_path / "run", "--set", "finetuning=null")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "finetuning is needed" in done.stderr
    assert not (tmp_path / "run").exists()
