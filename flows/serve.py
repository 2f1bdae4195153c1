"""``rise serve``: a local Prefect server, a work pool, a worker and the deployments, started and stopped together.

Run as a program, this module is the guard: it ends what ``rise serve`` started when that was killed.
"""

from __future__ import annotations

import asyncio
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
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]

from tasks.common.errors import InputError

HOST, POOL = "127.0.0.1", "rise"
DATABASE = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
"""Prefect's names for the database's URL, the new one and the old."""
DEPLOYMENTS = Path(__file__).parents[1] / "prefect.yaml"
_STARTED_SECONDS, _STOPPED_SECONDS = 600, 30


class _Stop(Exception):
    """A signal asked for the end."""


def serve(port: int, home: Path, database: str | None = None) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; then, and after a SIGKILL too, every process that was started is gone.

    Args:
        port: of the server on the loopback address.
        home: where the server keeps its database and logs; runs that were recorded there are shown again.
        database: URL of the PostgreSQL database to keep in place of a file in ``home``.

    Raises:
        InputError: the port is taken, the database cannot be used, prefect.yaml is not there, or one of the programs
            ends by itself.
    """
    if not DEPLOYMENTS.is_file():
        raise InputError("the deployments are part of the repository; install from a checkout with pip install -e .",
                         file=DEPLOYMENTS)  # fmt: skip
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise InputError(f"port {port} is taken; end what listens there, or choose another --port")
    kept = {} if database is None else {DATABASE[0]: _answering(database)}
    home.mkdir(parents=True, exist_ok=True)
    environment = {
        **{name: value for name, value in os.environ.items() if name not in DATABASE},  # it may hold a password
        "PREFECT_HOME": str(home.resolve()), "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_CLI_PROMPT": "false",
        "RISE_DIRECTORY": str(Path.cwd()),
    }  # fmt: skip
    with _signals(), _Programs(environment, home) as programs:
        programs.start("server", "server", "start", "--host", HOST, "--port", str(port), more=kept)
        programs.wait_for(f"http://{HOST}:{port}/api/health")
        programs.finish("pool", "work-pool", "create", POOL, "--type", "process", "--overwrite")
        programs.finish("deploy", "--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOYMENTS))
        worker = f"rise-{socket.gethostname()}"
        _close_runs(environment["PREFECT_API_URL"], worker)
        programs.start("worker", "worker", "start", "--pool", POOL, "--name", worker)
        print(f"http://{HOST}:{port}", flush=True)
        print(f"serving the deployments of {DEPLOYMENTS.name}; Ctrl-C ends it, logs stand in {home}", file=sys.stderr)
        programs.watch()


def _close_runs(api: str, worker: str) -> None:
    """Tell the server that the runs of a worker that was killed are over: until their leases end, minutes later, each
    would hold the one place that its deployment has.

    No worker of this name is at work yet, so what is said to run under it does not.
    """
    under_way = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}}
    for run in _ask(f"{api}/flow_runs/filter", under_way):
        if (run["labels"] or {}).get("prefect.worker.name") == worker:
            message = "rise serve was killed; what is whole is kept, and a retry or the next run goes on with it"
            _ask(f"{api}/flow_runs/{run['id']}/set_state",
                 {"state": {"type": "CRASHED", "name": "Crashed", "message": message}})  # fmt: skip


def _ask(address: str, question: Any) -> Any:
    """What the server answers; it is asked again while its database is busy.

    Raises:
        InputError: it does not answer.
    """
    request = urllib.request.Request(address, json.dumps(question).encode(), {"Content-Type": "application/json"})
    for _ in range(60):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except (urllib.error.URLError, OSError) as error:
            problem = str(error)
            time.sleep(1)
    raise InputError(f"the server at {address} does not answer ({problem})")


def _answering(database: str) -> str:
    """The URL with the driver that Prefect takes, once the database has answered.

    Raises:
        InputError: it does not; the password is not named.
    """
    from asyncpg import PostgresError  # type: ignore[import-untyped]
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.ext.asyncio import create_async_engine

    try:
        url = make_url(database)
        if url.drivername in ("postgresql", "postgres"):
            url = url.set(drivername="postgresql+asyncpg")
        if url.drivername != "postgresql+asyncpg":
            raise InputError(f"--database is a URL of {url.drivername}; give postgresql://USER:PASSWORD@HOST/NAME, or "
                             "leave it out for a file in --home")  # fmt: skip

        async def ask() -> None:
            engine = create_async_engine(url, connect_args={"timeout": 10})
            try:
                async with engine.connect():
                    pass
            finally:
                await engine.dispose()

        asyncio.run(ask())
    except (PostgresError, SQLAlchemyError, OSError, ValueError) as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"the database of --database cannot be used ({first}); it must be started, and the URL "
                         "postgresql://USER:PASSWORD@HOST:PORT/NAME") from None  # fmt: skip
    return url.render_as_string(hide_password=False)


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
    """Prefect's programs, each in a session of its own, with their output in files, and a guard over them."""

    def __init__(self, environment: Mapping[str, str], logs: Path) -> None:
        self._environment, self._logs = environment, logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> _Programs:
        # It reads from a pipe whose other end closes with this process, however that ends.
        self._guard = subprocess.Popen([sys.executable, "-m", "flows.serve"], stdin=subprocess.PIPE, text=True,
                                       stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        """End the last program first, and whatever any of them has started."""
        for program in reversed(self._running.values()):
            _end(psutil.Process(program.pid))
            program.wait()
        self._guard.communicate()

    def start(self, name: str, *arguments: str, more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start ``prefect ARGUMENTS``, with ``more`` in its environment."""
        with (self._logs / f"{name}.log").open("ab") as log:
            program = subprocess.Popen([sys.executable, "-m", "prefect", *arguments],
                                       env={**self._environment, **(more or {})},
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        assert self._guard.stdin is not None
        print(program.pid, file=self._guard.stdin, flush=True)
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


def _end(process: psutil.Process) -> None:
    """End a program and whatever it has started."""
    family = _family(process.pid)
    try:
        process.terminate()  # a worker then ends its flow runs and tells the server
        process.wait(_STOPPED_SECONDS)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        print(f"{' '.join(process.cmdline()[2:5])} does not end; it is killed", file=sys.stderr)
    for one in {*family, *_family(process.pid)}:
        if one.is_running():
            one.kill()


def _family(pid: int) -> set[psutil.Process]:
    """A process and all its descendants that run."""
    try:
        process = psutil.Process(pid)
        return {process, *process.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def _guard() -> None:
    """End the programs named on stdin that still run when it closes."""
    programs = []
    for line in sys.stdin:
        with suppress(psutil.NoSuchProcess):
            programs.append(psutil.Process(int(line)))
    for program in reversed(programs):
        if program.is_running():
            _end(program)


if __name__ == "__main__":
    _guard()
