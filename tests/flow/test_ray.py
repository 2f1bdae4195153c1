"""Shards made by Ray's workers for real: a worker killed, the command interrupted, nothing lost or left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tasks.common.stage import digest_directory
from tests.flow.conftest import REPOSITORY, texts

pytest.importorskip("prefect_ray")
pytestmark = pytest.mark.ray


class Build:
    """``rise index build`` in a process of its own, and all that it starts."""

    def __init__(self, server: dict[str, str], model: Path, data: Path, out: Path, *options: str) -> None:
        self.out, self.family, self.said = out, set[psutil.Process](), out.with_suffix(".err")
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", "index", "build", "--model", str(model), "--data", str(data),
                 "--out", str(out), "--dtype", "bit", "--fit-documents", "150", "--shard-tokens", "250", "--kr", "16",
                 "--kh", "6", "--kg", "12", "--precision", "float32", *options],
                env={**server, "OMP_NUM_THREADS": "1"}, cwd=REPOSITORY, stdout=said, stderr=said,
                start_new_session=True,
            )  # fmt: skip

    def until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not ready():
            self.look()
            assert self.process.poll() is None, self.said.read_text() + self.log()
            assert time.monotonic() < deadline, self.said.read_text() + self.log()
            time.sleep(0.05)
        self.look()

    def end(self) -> int:
        """Wait for the exit status."""
        while self.process.poll() is None:
            self.look()
            time.sleep(0.1)
        return self.process.returncode

    def look(self) -> None:
        try:
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def log(self) -> str:
        return (self.out / "ray.log").read_text() if (self.out / "ray.log").exists() else ""

    def workers(self) -> list[psutil.Process]:
        """Ray's workers that have a share: those have the model in memory."""
        return [one for one in self.family if one.is_running() and _name(one).startswith("ray::")
                and "Idle" not in _name(one) and "IDLE" not in _name(one) and "Agent" not in _name(one)]  # fmt: skip

    def gone(self) -> list[str]:
        """Processes that are still there after some seconds."""
        _, alive = psutil.wait_procs(self.family, timeout=20)
        return [_name(one) for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _whole(out: Path) -> int:
    """Shards of sample and index that are whole."""
    return len(list(out.glob("**/shards/*.json")))


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short name: Ray's sockets lie below it."""
    place = Path("/tmp") / f"rise-{os.getpid()}"
    place.mkdir()
    yield place
    left = list(place.iterdir())
    subprocess.run(["rm", "-r", str(place)], check=True)
    assert left == []


def test_killed_and_interrupted_it_ends_with_the_bytes_of_one_process(
    server: dict[str, str], models: dict[str, Path], tmp_path: Path, short: Path
) -> None:
    data = tmp_path / "pool.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(300, 3)))
    alone = Build(server, models["scorer"], data, tmp_path / "alone")
    assert alone.end() == 0, alone.said.read_text()

    shared = tmp_path / "shared"
    options = ["--runner", "ray", "--workers", "2", "--ray", f"temp={short}", "--ray", "gpus=0"]
    first = Build(server, models["scorer"], data, shared, *options)
    first.until(lambda: _whole(shared) >= 2)
    assert len([one for one in first.family if "raylet" in _name(one)]) >= 1
    listening = [one.laddr.ip for process in first.family if process.is_running()
                 for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]  # fmt: skip
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}
    first.process.send_signal(signal.SIGINT)
    assert first.end() == 130, first.said.read_text()
    assert first.gone() == []
    before = {path: path.stat().st_mtime_ns for path in shared.glob("sample/shards/*.json")}
    assert not (shared / "manifest.json").exists()

    again = Build(server, models["scorer"], data, shared, *options)
    stopped = _whole(shared)
    again.until(lambda: _whole(shared) >= stopped + 2)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in shared.glob("sample/shards/*.json")}.items()
    again.workers()[0].kill()
    assert again.end() == 0, again.said.read_text() + again.log()
    assert again.gone() == []
    assert digest_directory(shared) == digest_directory(tmp_path / "alone")


def test_a_worker_that_dies_again_and_again_is_one_line(
    server: dict[str, str], models: dict[str, Path], tmp_path: Path, short: Path
) -> None:
    """With no retry left the command fails by itself, keeps what is whole, and the next call goes on."""
    data = tmp_path / "pool.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(300, 4)))
    out = tmp_path / "out"
    options = ["--runner", "ray", "--workers", "1", "--ray", f"temp={short}", "--ray", "gpus=0", "--ray", "retries=0"]
    build = Build(server, models["scorer"], data, out, *options)
    build.until(lambda: _whole(out) >= 1)
    build.workers()[0].kill()
    assert build.end() == 1
    line = build.said.read_text().replace("\r", "\n").splitlines()[-1]
    assert "a worker of Ray was lost for good" in line
    assert "the same command goes on" in line
    assert build.gone() == []
    kept = _whole(out)
    assert kept >= 1
    local = Build(server, models["scorer"], data, out)
    assert local.end() == 0, local.said.read_text()


def test_a_worker_that_needs_more_than_there_is_is_refused(
    server: dict[str, str], models: dict[str, Path], tmp_path: Path, short: Path
) -> None:
    data = tmp_path / "pool.jsonl"
    data.write_text('{"text": "a document of some words"}\n')
    build = Build(server, models["scorer"], data, tmp_path / "out", "--runner", "ray", "--ray", f"temp={short}",
                  "--ray", "gpus=64")  # fmt: skip
    assert build.end() == 2, build.said.read_text() + build.log()
    assert "a worker needs 1 cores and 64 GPUs, and no machine of Ray's has both" in build.said.read_text()
    assert build.gone() == []
