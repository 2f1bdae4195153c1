"""One Prefect server for the tests that need one, and a small study made of tiny models and made-up text."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from tests.tiny import tiny_bpe, tiny_encoder, tiny_gpt_neox, tiny_olmo3

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a running Prefect server of its own."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 180
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None, (home / "server.log").read_text()
        assert time.monotonic() < deadline, (home / "server.log").read_text()
        time.sleep(0.3)
    yield environment
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random stand-ins of the paper's models, with a small byte-pair tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "scorer": tiny_olmo3(folder / "olmo3", vocab=8000, max_position_embeddings=512),
        "trainee": tiny_gpt_neox(folder / "neox", vocab=8000, max_position_embeddings=2048),
        "encoder": tiny_encoder(folder / "encoder"),
    }
    for name in ("scorer", "trainee"):
        tiny_bpe(made[name], vocab=8000)
    return made


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Served:
    """``rise serve`` at work."""

    process: subprocess.Popen[str]
    api: str

    def call(self, path: str, values: dict[str, Any] | None = None) -> Any:
        """What the server's API answers: to GET, or to POST of some values."""
        data = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(self.api + path, data, {"Content-Type": "application/json"})
        for _ in range(60):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
                time.sleep(1)  # SQLite was locked for too long on a busy machine; Prefect asks again, too
        raise AssertionError(f"{path}: the server is busy for good")

    def begin(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Have a deployment run; the id of the flow run."""
        found = {one["name"]: one["id"] for one in self.call("/deployments/filter", {})}
        return str(self.call(f"/deployments/{found[deployment]}/create_flow_run", {"parameters": parameters})["id"])

    def wait_for(self, flow_run: str, *states: str) -> str:
        """Wait until a flow run is in one of some states, or over; its state."""
        for _ in range(1200):
            state = self.call(f"/flow_runs/{flow_run}")["state_type"]
            if state in (*states, "COMPLETED", "FAILED", "CRASHED"):
                return str(state)
            time.sleep(0.5)
        raise AssertionError(f"still {state}")

    def family(self) -> list[psutil.Process]:
        """Every process that it has started."""
        return list(psutil.Process(self.process.pid).children(recursive=True))


@contextmanager
def served(environment: dict[str, str], folder: Path, *options: object, **more: str) -> Iterator[Served]:
    """``rise serve`` in a folder, with a server of its own; ended at the end, if it still runs."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "serve", "--port", str(port), "--home", str(folder / "home"),
         *map(str, options)], cwd=folder, stdout=subprocess.PIPE, text=True,
        env={**{name: value for name, value in environment.items() if not name.startswith("PREFECT_API")},
             "PYTHONPATH": str(REPOSITORY), **more},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"http://127.0.0.1:{port}\n"
        yield Served(process, f"http://127.0.0.1:{port}/api")
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(120)


def left_over(family: list[psutil.Process], seconds: float = 0) -> list[psutil.Process]:
    """Those of some processes that still run after so long."""
    _, alive = psutil.wait_procs(family, timeout=seconds)
    return [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def texts(count: int, seed: int) -> list[str]:
    """Made-up documents of 8 to 40 words that are no near duplicates of each other."""
    rng = np.random.default_rng(seed)
    syllables = ["ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu", "pla", "stro"]
    words = ["".join(rng.choice(syllables, rng.integers(2, 4))) for _ in range(600)]
    return [" ".join(rng.choice(words, rng.integers(8, 40))) + "." for _ in range(count)]


@pytest.fixture(scope="session")
def brain_rot(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files in the Brain Rot study's own form: arrays of {text}."""
    folder = tmp_path_factory.mktemp("brain_rot")
    files = {}
    for seed, (name, count) in enumerate({"control": 60, "junk": 160}.items()):
        files[name] = folder / f"{name}.json"
        files[name].write_text(json.dumps([{"text": text} for text in texts(count, seed)]))
    return files


@pytest.fixture(scope="session")
def tiny_conf(models: dict[str, Path], brain_rot: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed loop that needs no network and takes seconds."""
    values: dict[str, Any] = {
        "name": "tiny",
        "pool": {
            "size": 80, "queries": 6, "heldout": {"control": 8, "junk": 8},
            "sources": {name: {"label": name, "path": str(path)} for name, path in brain_rot.items()},
        },
        "scorer": {"model": str(models["scorer"]), "precision": "float32", "batch_tokens": 256, "shard_tokens": 512},
        "arms": {
            "random": {"method": "random"}, "perplexity": {"method": "perplexity"}, "bm25": {"method": "bm25"},
            "rise": {"method": "rise", "sketch": {"kr": 16, "kh": 6, "kg": 12}},
        },
        "selection": {"resamples": 100},
        "pretraining": {"model": str(models["trainee"]), "precision": "float32", "epochs": 3, "batch_size": 2,
                        "max_length": 64, "checkpoint_every": 2},
        "evaluation": {"precision": "float32", "resamples": 100, "arc": None, "ruler_cwe": None},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("conf") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def rise(server: dict[str, str]) -> Any:
    """Run ``rise …`` against the server and return the finished process."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "flows.cli", *map(str, arguments)], capture_output=True,
                              text=True, check=False, env=server, cwd=REPOSITORY, timeout=600, **options)  # fmt: skip

    return run


@pytest.fixture(scope="session")
def whole_run(tiny_conf: Path, server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny closed loop, run once without a break."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run([sys.executable, "-m", "flows.cli", "run", str(tiny_conf), "--out", str(out)],
                          capture_output=True, text=True, check=False, env=server, cwd=REPOSITORY,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (out / "stdout.txt").write_text(done.stdout)
    return out


@pytest.fixture
def copy_of_whole_run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))
