"""Curation under Prefect: killed for real and gone on with, and ``rise serve`` from start to stop."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from tasks.common.files import read_json
from tasks.selection.curation_ledger import curation_digest
from tests.flow.conftest import REPOSITORY, texts


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
    """The deployments are registered, a run of curation makes a selection and artifacts, and nothing is left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shutil.copytree(conf.parent / "inbox", tmp_path / "inbox")
    environment = {name: value for name, value in server.items() if not name.startswith("PREFECT_API")}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "serve", "--port", str(port), "--home", str(tmp_path / "home")],
        env={**environment, "PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    family: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"http://127.0.0.1:{port}\n"

        def call(path: str, values: dict[str, Any]) -> Any:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/api{path}", json.dumps(values).encode(),
                                             {"Content-Type": "application/json"})  # fmt: skip
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        deployed = {one["name"]: one for one in call("/deployments/filter", {})}
        assert set(deployed) == {"nightly", "closed-loop", "study"}
        nightly = deployed["nightly"]
        assert nightly["schedules"][0]["schedule"]["cron"] == "0 3 * * *"
        assert nightly["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        schema = nightly["parameter_openapi_schema"]["properties"]
        assert "YAML file" in schema["conf"]["description"]
        assert schema["documents"]["anyOf"][0]["minimum"] == 1
        made = call(f"/deployments/{nightly['id']}/create_flow_run",
                    {"parameters": {"conf": str(conf), "directory": "out", "documents": 7}})  # fmt: skip
        state = ""
        for _ in range(600):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/flow_runs/{made['id']}", timeout=60) as answer:
                state = json.load(answer)["state_type"]
            family = psutil.Process(process.pid).children(recursive=True)
            if state in ("COMPLETED", "FAILED", "CRASHED"):
                break
            time.sleep(1)
        assert state == "COMPLETED"
        assert (tmp_path / "out" / "latest").read_text() == "selections/0001\n"
        keys = {one["key"] for one in call("/artifacts/filter", {})}
        assert {"cur-selection", "cur-drift", "cur-purity"} <= keys
    finally:
        process.terminate()
        status = process.wait(120)
    assert status == 0
    assert len(family) >= 2
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
