"""Curation under Prefect: killed for real and gone on with, and ``rise serve`` from start to stop."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.common.files import read_json
from tasks.selection.curation_ledger import curation_digest
from tests.flow.conftest import REPOSITORY, left_over, served, texts


@pytest.fixture(scope="module")
def conf(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curation")
    (folder / "inbox").mkdir()
    for name, seed in {"inbox/a.jsonl": 0, "inbox/b.jsonl": 1, "queries.jsonl": 2}.items():
        lines = (json.dumps({"text": text, "label": "control"}) for text in texts(40, seed))
        (folder / name).write_text("\n".join(lines))
    path = folder / "curation.yaml"
    path.write_text(yaml.safe_dump({
        "name": "cur", "intake": {"sources": {"inbox": {"folder": str(folder / "inbox")}}},
        "queries": str(folder / "queries.jsonl"), "budget": {"tokens": 500}, "positive": "control",
        "scorer": {"model": str(models["scorer"]), "precision": "float32", "batch_tokens": 256, "shard_tokens": 400},
        "signature": {"sketch": {"kr": 16, "kh": 6, "kg": 12}},
    }))  # fmt: skip
    return path


def test_a_killed_run_goes_on(conf: Path, rise: Any, server: dict[str, str], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    done = rise("curate", conf, "--out", whole)
    took = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert f"digest: {read_json(whole / 'runs' / '0001' / 'run.json')['entry']['digest']}" in done.stdout
    assert "1 runs, 80 documents" in rise("status", whole).stdout
    generator = random.Random(5)
    command = [sys.executable, "-m", "flows.cli", "curate", str(conf), "--out", str(killed)]
    for _ in range(3):
        process = subprocess.Popen(command, env=server, cwd=REPOSITORY, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        time.sleep(generator.uniform(0.3, 0.95) * took)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    again = rise("curate", conf, "--out", killed)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert curation_digest(killed / "curation.duckdb") == curation_digest(whole / "curation.duckdb")
    same = rise("curate", conf, "--out", killed)
    assert "nothing is new" in same.stdout


def test_input_errors_are_one_line(conf: Path, rise: Any, tmp_path: Path) -> None:
    for setting, problem in {"intake.sources.inbox.folder=none": "no such folder", "budget.tokens=0": "budget.tokens",
                             "queries=none.jsonl": "no such file"}.items():  # fmt: skip
        done = rise("curate", conf, "--out", tmp_path / "out", "--set", setting)
        assert done.returncode == 2
        assert problem in done.stderr
        assert "Traceback" not in done.stderr


def test_serve_starts_everything_and_stops_it(conf: Path, server: dict[str, str], tmp_path: Path) -> None:
    """Deployments, a run with its artifacts, and nothing left when it is killed, or ended, in the middle of another."""
    shutil.copytree(conf.parent / "inbox", tmp_path / "inbox")
    run = {"conf": str(conf), "directory": "out", "documents": 7}
    with served(server, tmp_path) as serving:
        deployed = {one["name"]: one for one in serving.call("/deployments/filter", {})}
        assert set(deployed) == {"nightly", "closed-loop", "study"}
        nightly = deployed["nightly"]
        assert nightly["schedules"][0]["schedule"]["cron"] == "0 3 * * *"
        assert nightly["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        schema = nightly["parameter_openapi_schema"]["properties"]
        assert "YAML file" in schema["conf"]["description"]
        assert schema["documents"]["anyOf"][0]["minimum"] == 1
        assert serving.wait_for(serving.begin("nightly", run)) == "COMPLETED"
        assert (tmp_path / "out" / "latest").read_text() == "selections/0001\n"
        artifacts = {one["key"]: one for one in serving.call("/artifacts/filter", {})}
        assert {"cur-selection", "cur-drift", "cur-purity"} <= set(artifacts)
        [picture] = re.findall(r"!\[The runs\]\(data:image/png;base64,(.*)\)", artifacts["cur-selection"]["data"])
        assert base64.b64decode(picture).startswith(b"\x89PNG")
        # A rate only where work took a measurable time.
        told = [one["description"] for one in serving.call("/artifacts/filter", {}) if one["type"] == "progress"]
        assert any(re.match(r"scoring new documents: [\d,]+ of [\d,]+ tokens, [\d,.]+ a second$", one) for one in told)
        killed = serving.begin("nightly", {**run, "directory": "killed"})
        assert serving.wait_for(killed, "RUNNING") == "RUNNING"
        while not (tmp_path / "killed" / ".lock").exists():
            time.sleep(0.05)
        family = serving.family()
        assert len(family) >= 4  # guard, server, worker, flow run
        serving.process.kill()
        assert not left_over(family, 90)
    with served(server, tmp_path) as serving:  # the next one goes on
        assert serving.wait_for(serving.begin("nightly", {**run, "directory": "killed"})) == "COMPLETED"
        assert curation_digest(tmp_path / "killed" / "curation.duckdb") == curation_digest(
            tmp_path / "out" / "curation.duckdb")  # fmt: skip
        family = serving.family()
        serving.process.terminate()
        assert serving.process.wait(120) == 0
        assert not left_over(family)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(serving.api.split(":")[2].split("/")[0]))) != 0
