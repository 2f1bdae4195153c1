"""``rise serve``: a local Prefect server, a work pool, a worker and the deployments, started and stopped together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil  # type: ignore[import-untyped]

from tasks.common.errors import InputError

HOST, POOL = "127.0.0.1", "rise"
DEPLOYMENTS = Path(__file__).parents[1] / "prefect.yaml"
_STARTED_SECONDS, _STOPPED_SECONDS = 600, 30


class _Stop(Exception):
    """A signal asked for the end."""


def serve(port: int, home: Path) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; then every process that was started is gone.

    Args:
        port: of the server on the loopback address.
        home: where the server keeps its database and logs; runs that were recorded there are shown again.

    Raises:
        InputError: the port is taken, prefect.yaml is not there, or one of the programs ends by itself.
    """
    if not DEPLOYMENTS.is_file():
        raise InputError("the deployments are part of the repository; install from a checkout with pip install -e .",
                         file=DEPLOYMENTS)  # fmt: skip
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise InputError(f"port {port} is taken; end what listens there, or choose another --port")
    home.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "PREFECT_HOME": str(home.resolve()), "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_CLI_PROMPT": "false",
        "RISE_DIRECTORY": str(Path.cwd()),
    }  # fmt: skip
    with _signals(), _Programs(environment, home) as programs:
        programs.start("server", "server", "start", "--host", HOST, "--port", str(port))
        programs.wait_for(f"http://{HOST}:{port}/api/health")
        programs.finish("pool", "work-pool", "create", POOL, "--type", "process", "--overwrite")
        programs.finish("deploy", "--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOYMENTS))
        programs.start("worker", "worker", "start", "--pool", POOL, "--name", f"rise-{socket.gethostname()}")
        print(f"http://{HOST}:{port}", flush=True)
        print(f"serving the deployments of {DEPLOYMENTS.name}; Ctrl-C ends it, logs stand in {home}", file=sys.stderr)
        programs.watch()


@contextmanager
def _signals() -> Iterator[None]:
    """Turn the signals that ask for an end into :class:`_Stop`, and that into a quiet return; once."""

    def stop(number: int, _: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)  # a second one must not cut the orderly end short
        raise _Stop(number)

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except _Stop:
        pass
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class _Programs:
    """Prefect's programs, each in a session of its own, with their output in files."""

    def __init__(self, environment: Mapping[str, str], logs: Path) -> None:
        self._environment, self._logs = environment, logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> _Programs:
        return self

    def __exit__(self, *_: object) -> None:
        """End the last program first, and whatever any of them has started."""
        for name, program in reversed(self._running.items()):
            family = _family(program.pid)
            program.terminate()  # a worker then ends its flow runs and tells the server
            try:
                program.wait(_STOPPED_SECONDS)
            except subprocess.TimeoutExpired:
                print(f"{name} does not end; it is killed", file=sys.stderr)
            for process in {*family, *_family(program.pid)}:
                if process.is_running():
                    process.kill()
            program.wait()

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``prefect ARGUMENTS``."""
        with (self._logs / f"{name}.log").open("ab") as log:
            program = subprocess.Popen([sys.executable, "-m", "prefect", *arguments], env=dict(self._environment),
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._running[name] = program
        return program

    def finish(self, name: str, *arguments: str) -> None:
        """Run ``prefect ARGUMENTS`` to its end."""
        program = self.start(name, *arguments)
        if program.wait() != 0:
            self._fail(name)
        del self._running[name]

    def wait_for(self, address: str) -> None:
        """Wait until the server answers."""
        for _ in range(_STARTED_SECONDS * 4):
            self._check()
            try:
                with urllib.request.urlopen(address, timeout=5) as answer:
                    if json.load(answer) is True:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        raise InputError(f"the server does not answer after {_STARTED_SECONDS} s", file=self._logs / "server.log")

    def watch(self) -> None:
        """Wait until a signal comes or a program ends."""
        while True:
            self._check()
            threading.Event().wait(0.5)

    def _check(self) -> None:
        for name, program in self._running.items():
            if program.poll() is not None:
                self._fail(name)

    def _fail(self, name: str) -> None:
        log = self._logs / f"{name}.log"
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise InputError(f"{name} ended by itself: {lines[-1].strip() if lines else 'it said nothing'}", file=log)


def _family(pid: int) -> set[psutil.Process]:
    """A process and all its descendants that run."""
    try:
        process = psutil.Process(pid)
        return {process, *process.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()
