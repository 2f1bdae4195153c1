"""A retrieval study from the command line: whole, again, killed, refused, chosen from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import duckdb
import pytest
import yaml

from tasks.common.errors import InputError
from tasks.common.files import read_json
from tasks.common.stage import Ref
from tasks.selection.study_ledger import Absent
from tests.flow.conftest import REPOSITORY, texts
from tests.tiny import tiny_llama

ARMS = {
    "length": {"method": "length"}, "perplexity": {"method": "perplexity"}, "bm25": {"method": "bm25"},
    "rise": {"method": "rise", "sketch": {"kr": 16, "kh": 6, "kg": 12}},
    "rise-bit": {"method": "rise", "sketch": {"kr": 16, "kh": 6, "kg": 12}, "calibration": "median-bit",
                 "index_type": "bit"},
}  # fmt: skip


def pool_fields(folder: Path, name: str, seed: int, extra: str) -> dict[str, Any]:
    """A pool of made-up text on disk; ``extra`` is in every control document."""
    sources = {}
    for number, (label, count) in enumerate({"control": 30, "junk": 80}.items()):
        path = folder / f"{name}-{label}.jsonl"
        mark = f"{extra} " if label == "control" else ""
        lines = [json.dumps({"text": mark + text}) for text in texts(count, seed + number)]
        path.write_text("\n".join(lines))
        sources[f"{name}-{label}"] = {"label": label, "path": str(path)}
    return {"size": 60, "control_share": 0.2, "queries": 5, "sources": sources}


@pytest.fixture(scope="session")
def study_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two tiny pools, one of them in a file of its own, under both paradigms, with two seeds."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "pools").mkdir()
    (folder / "pools" / "dev.yaml").write_text(yaml.safe_dump(pool_fields(folder, "dev", 20, "<i>howdy</i>")))
    values = {
        "name": "tiny-study", "title": "A <b>tiny</b> study",
        "scorer": {"model": str(tiny_llama(folder / "scorer")), "precision": "float32", "max_length": 48,
                   "batch_tokens": 512, "shard_tokens": 1024},
        "pools": {
            "howdy-dev": {"task": "Howdy!", "split": "dev", "pool": "pools/dev.yaml", "ks": [5, 10]},
            "brainrot-test": {"task": "Brain Rot", "split": "heldout", "pool": pool_fields(folder, "test", 30, "tango"),
                              "ks": [2, 5]},
        },
        "methods": ARMS, "seeds": [1, 2], "paradigms": ["predict", "recall"], "resamples": 50,
        "finetuning": {"precision": "float32", "epochs": 1, "batch_size": 20, "max_length": 48},
        "rule": {"candidates": ["rise", "rise-bit"], "max_bytes": 1024},
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def whole_study(study_conf: Path, server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny study, run once without a break."""
    out = tmp_path_factory.mktemp("whole_study") / "run"
    done = subprocess.run([sys.executable, "-m", "flows.cli", "study", str(study_conf), "--out", str(out)],
                          capture_output=True, text=True, check=False, env=server, cwd=REPOSITORY,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (out / "stdout.txt").write_text(done.stdout)
    return out


def test_a_study_leaves_every_figure(whole_study: Path) -> None:
    with duckdb.connect(whole_study / "study.duckdb", read_only=True) as con:
        def count(sql: str) -> Any:
            return con.execute(sql).fetchone()

        # 2 pools × 2 paradigms × (3 arms + 2 arms of RISE × 2 seeds)
        assert count("SELECT count(*), count(DISTINCT (pool, paradigm, method, seed)) FROM rankings") == (28, 28)
        assert count("SELECT count(*) FROM retrieval") == (56,)
        assert count("SELECT count(*) FROM rankings WHERE method LIKE 'rise%' AND seed IN (1, 2)") == (16,)
        assert count("SELECT count(*) FROM rankings WHERE method NOT LIKE 'rise%' AND seed IS NULL") == (12,)
        assert count("SELECT count(*) FROM rankings WHERE purity IS NULL OR purity_low > purity_high") == (0,)
        assert count("SELECT min(purity) > 0.6 FROM rankings WHERE pool = 'howdy-dev' AND method = 'bm25'") == (True,)
        assert count("SELECT count(*) FROM rankings WHERE method = 'rise' AND pq_low <= pq_auprc "
                     "AND pq_auprc <= pq_high") == (8,)  # fmt: skip
        assert count("SELECT documents, positives, queries, label FROM pools WHERE pool = 'howdy-dev'") == (
            60, 12, 5, "control")  # fmt: skip
        assert count("SELECT list(task ORDER BY rowid) FROM pools") == (["Howdy!", "Brain Rot"],)
        # 2 bytes × 6 × (16 + 12), and 168 bits
        assert count("SELECT DISTINCT bytes_a_document FROM costs WHERE method = 'rise'") == (336.0,)
        assert count("SELECT DISTINCT bytes_a_document < 32 FROM costs WHERE method = 'rise-bit'") == (True,)
        assert count("SELECT bool_and(build_seconds > 0), bool_and(shared), bool_and(peak_mib > 10), "
                     "bool_and(query_seconds > 0) FROM costs WHERE method LIKE 'rise%'") == (True, True, True, True)
        assert count("SELECT bool_or(shared), bool_and(bytes_a_document IS NULL) FROM costs "
                     "WHERE method IN ('length', 'bm25')") == (False, True)  # fmt: skip
        seeds = con.execute("SELECT count(DISTINCT pq_auprc) FROM rankings WHERE method = 'rise' "
                            "AND pool = 'howdy-dev' AND paradigm = 'predict'").fetchone()  # fmt: skip
        assert seeds == (2,), "the seeds of the hashes make a difference"


def test_recall_reads_out_what_was_fine_tuned_on_the_whole_pool(whole_study: Path) -> None:
    stages = read_json(whole_study / "manifest.json")["stages"]
    assert stages["selection/all.howdy-dev"]["rows"] == 60
    assert {name for name in stages if name.startswith("pretraining/")} == {
        "pretraining/howdy-dev", "pretraining/brainrot-test"}  # fmt: skip
    for pool in ("howdy-dev", "brainrot-test"):
        read, tuned = (stages[f"scoring/{paradigm}.{pool}.readout@fp16"] for paradigm in ("predict", "recall"))
        assert read["digest"] != tuned["digest"]
        assert stages[f"scoring/recall.{pool}.bm25"]["digest"] == stages[f"scoring/predict.{pool}.bm25"]["digest"]
    kept = list((whole_study / "scoring" / "predict.howdy-dev.readout@fp16").glob("*/pool"))
    assert len(kept) == 2, "one pass for both arms, a sketch a seed"


def test_the_choice_is_derived_from_the_ledger_alone(whole_study: Path, study_conf: Path, rise: Any) -> None:
    printed = (whole_study / "stdout.txt").read_text()
    done = rise("study", study_conf, "--out", whole_study, "--choose")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in printed
    with duckdb.connect(whole_study / "study.duckdb", read_only=True) as con:
        chosen = con.execute("SELECT arm FROM choice WHERE chosen").fetchall()
        assert con.execute("SELECT count(*) FROM ranks WHERE pool = 'brainrot-test'").fetchone() == (0,)
        assert con.execute("SELECT count(*) FROM ranks").fetchone() == (4,)
    assert f"chosen: {chosen[0][0]}" in done.stdout
    small = rise("study", study_conf, "--out", whole_study, "--choose", "--set", "rule.max_bytes=40")
    assert "chosen: rise-bit" in small.stdout
    none = rise("study", study_conf, "--out", whole_study, "--choose", "--set", "rule.max_bytes=1")
    assert none.returncode == 2
    assert "no candidate keeps at most 1 bytes" in none.stderr


class _Page(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or (name in ("src", "href") and not (value or "").startswith("#"))
                       for name, value in attrs)  # fmt: skip

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_shows_every_arm_on_every_pool(whole_study: Path) -> None:
    source = (whole_study / "report.html").read_text()
    page = _Page(source)
    text = " ".join(" ".join(page.words).split())
    assert "A <b>tiny</b> study" in text
    assert "<b>tiny" not in source
    assert "script" not in page.tags
    for words in ("Dev pools", "Held-out pools", "recall (retrospective)", "K = 10", "shared pass", "chosen",
                  "Wins and losses of rise", "Shortcuts", "336", "tiny-study"):  # fmt: skip
        assert words in text, words
    for pool in ("howdy-dev", "brainrot-test"):
        for paradigm in ("predict", "recall"):
            table = source.split(f'aria-label="{pool}, {paradigm}"')[1].split("</table>")[0]
            assert all(f">{arm}</th>" in table for arm in ARMS), (pool, paradigm)
            assert 'class="best"' in table
    for text in texts(80, 21):
        assert text[:20] not in source, "no text of a pool"
    printed = (whole_study / "stdout.txt").read_text()
    assert "auPRC on the dev pools, μ ± δ over recall and predict" in printed
    assert "auPRC on the held-out pools" in printed
    assert read_json(whole_study / "manifest.json")["digest"] in printed


def test_again_recomputes_nothing_and_a_report_that_is_gone_comes_back(
    whole_study: Path, study_conf: Path, tmp_path: Path, rise: Any
) -> None:
    copy = Path(shutil.copytree(whole_study, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in copy.glob("*/**/manifest.json")}
    (copy / "report.html").unlink()
    done = rise("study", study_conf, "--out", copy)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in copy.glob("*/**/manifest.json")} == before
    assert (copy / "report.html").is_file()
    assert read_json(copy / "manifest.json")["digest"] == read_json(whole_study / "manifest.json")["digest"]
    report = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    assert rise("report", copy).stdout == f"{copy / 'report.html'}\n"
    assert rise("report", copy, "--out", copy / "other.html").returncode == 0
    assert (copy / "report.html").read_bytes() == (copy / "other.html").read_bytes() == report
    status = rise("status", copy)
    assert "pool/howdy-dev" in status.stdout
    assert "scoring/recall.howdy-dev.rise@2" in status.stdout
    assert ": whole" in status.stdout.splitlines()[0]
    refused = rise("study", study_conf, "--out", copy, "--set", "pools.howdy-dev.pool.size=50")
    assert refused.returncode == 2
    assert "field pools.howdy-dev.pool.size" in refused.stderr


def test_a_study_killed_again_and_again_ends_the_same(
    whole_study: Path, study_conf: Path, server: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "flows.cli", "study", str(study_conf), "--out", str(tmp_path / "run")]
    killed = 0
    for stages in (3, 11, 24, 1000):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, env=server, cwd=REPOSITORY, stdout=log, stderr=log,
                                       start_new_session=True)  # fmt: skip
        while process.poll() is None and len(list((tmp_path / "run").glob("*/*/manifest.json"))) < stages:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert killed == 3
    assert read_json(tmp_path / "run" / "manifest.json")["digest"] == read_json(whole_study / "manifest.json")["digest"]


def test_a_method_that_does_not_fit_leaves_a_row_that_says_so(study_conf: Path, tmp_path: Path) -> None:
    from flows.attribution import StudyRun
    from flows.study_config import load

    refused = {"predict.howdy-dev.bm25": "out of memory: it needs 9 GiB", "predict.brainrot-test.bm25": "no such file"}

    class Study(StudyRun):
        """Its stages make nothing."""

        def made(self, task: Any, *inputs: Any, stage: str, directory: str, **options: Any) -> Ref:
            if stage == "scoring" and directory in refused:
                raise InputError(refused[directory])
            return Ref(stage, directory, str(tmp_path / directory), "d", 60, "k", 0.0)

    config = load(study_conf)
    study, documents = Study(config, tmp_path, frozenset()), Ref("pool", "", str(tmp_path), "d", 60, "k", 0.0)
    study.judge("howdy-dev", "predict", config.scorer, documents)
    assert study.absent == [Absent("howdy-dev", "predict", "bm25", None, "out of memory")]
    assert {one.method for one in study.judged} == set(ARMS) - {"bm25"}
    with pytest.raises(InputError, match="no such file"):
        study.judge("brainrot-test", "predict", config.scorer, documents)


@pytest.mark.parametrize(("setting", "said"), [
    ("pools.howdy-dev.pool=none.yaml", "no such pool file"), ("pools.howdy-dev.ks=[5,40]", "80 documents"),
    ("rule.candidates=[rose]", "'rose'"), ("finetuning=null", "needs finetuning"), ("methods.rise.method=x", "rise"),
    ("pools.howdy-dev.pool.size=x", "pools.howdy-dev.pool.size"), ("paradigms=[recall]", "the rule needs"),
])  # fmt: skip
def test_a_bad_study_is_one_line(setting: str, said: str, study_conf: Path, tmp_path: Path, rise: Any) -> None:
    done = rise("study", study_conf, "--out", tmp_path / "run", "--set", setting)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "run").exists()
