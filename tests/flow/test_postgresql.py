"""``rise serve`` on PostgreSQL: a cluster of its own, started for real, and a run of a curation by the worker."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import yaml
from click.testing import CliRunner

from flows.cli import rise
from tasks.common.errors import InputError
from tests.flow.conftest import free_port, left_over, served, texts

PASSWORD, QUOTED = "a/secret", "a%2Fsecret"
"""Of every role, and as a URL has it."""


def programs() -> Path | None:
    """Where initdb and pg_ctl are; Debian keeps them off the path."""
    places = [Path(found).parent for found in [shutil.which("initdb")] if found]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()), None)


def ask(url: str, *sql: str) -> Any:
    """The first value that the last of some statements gives."""

    async def asked() -> Any:
        connection = await asyncpg.connect(url)
        try:
            return [await connection.fetchval(one) for one in sql][-1]
        finally:
            await connection.close()

    return asyncio.run(asked())


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URL of a new cluster, ``{}`` for the password, less the database; a plain role owns the one named prefect."""
    if (bin_ := programs()) is None:
        pytest.skip("PostgreSQL is not installed: neither initdb on the path nor /usr/lib/postgresql/*/bin")
    port = free_port()
    # Not pytest's own folder: PostgreSQL does not run as root, and another user cannot enter that.
    with tempfile.TemporaryDirectory(prefix="rise-postgresql-") as name:
        folder = Path(name)
        (folder / "password").write_text(PASSWORD)
        options: dict[str, Any] = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            for path in (folder, folder / "password"):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
            options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        subprocess.run([bin_ / "initdb", "-D", folder / "data", "-U", "postgres", "--auth=scram-sha-256", "--no-sync",
                        f"--pwfile={folder / 'password'}"], **options)  # fmt: skip
        control = [bin_ / "pg_ctl", "-D", folder / "data", "-w"]
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        subprocess.run([*control, "-l", folder / "log", "-o", settings, "start"], **options)
        try:
            ask(f"postgresql://postgres:{QUOTED}@127.0.0.1:{port}/postgres",
                f"CREATE ROLE rise LOGIN PASSWORD '{PASSWORD}'", "CREATE DATABASE prefect OWNER rise")  # fmt: skip
            yield f"postgresql://rise:{{}}@127.0.0.1:{port}/"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **options)


@pytest.fixture
def conf(models: dict[str, Path], tmp_path: Path) -> Path:
    (tmp_path / "inbox").mkdir()
    for name, seed in {"inbox/a.jsonl": 0, "queries.jsonl": 2}.items():
        (tmp_path / name).write_text("\n".join(json.dumps({"text": text}) for text in texts(10, seed)))
    path = tmp_path / "curation.yaml"
    path.write_text(yaml.safe_dump({
        "name": "cur", "intake": {"sources": {"inbox": {"folder": "inbox"}}}, "queries": "queries.jsonl",
        "scorer": {"model": str(models["scorer"]), "precision": "float32"}, "budget": {"documents": 3},
        "signature": {"sketch": {"kr": 16, "kh": 6, "kg": 12}},
    }))  # fmt: skip
    return path


def test_a_run_is_kept_in_postgresql(database: str, conf: Path, server: dict[str, str], tmp_path: Path) -> None:
    url = database.format(QUOTED) + "prefect"
    with served(server, tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL=url) as serving:
        run = serving.begin("nightly", {"conf": str(conf), "directory": "out"})
        assert serving.wait_for(run) == "COMPLETED"
        family = serving.family()
        told = [Path(f"/proc/{one.pid}/{file}").read_bytes() for one in family for file in ("cmdline", "environ")
                if "worker" in one.cmdline()]  # fmt: skip
        serving.process.terminate()
        assert serving.process.wait(120) == 0
        assert not left_over(family)
    assert told
    assert not any(b"secret" in one for one in told)  # the worker does not know it
    assert (tmp_path / "out" / "latest").read_text() == "selections/0001\n"
    assert not list((tmp_path / "home").glob("*.db"))
    assert ask(url, f"SELECT state_name FROM flow_run WHERE id = '{run}'") == "Completed"
    assert ask(url, "SELECT count(*) FROM deployment") == 3


def test_a_database_that_cannot_be_used_is_one_line(database: str, tmp_path: Path) -> None:
    for url, problem in {
        database.format("wrong") + "prefect": "password authentication failed",
        database.format(QUOTED) + "none": 'database "none" does not exist',
        f"postgresql://rise:secret@127.0.0.1:{free_port()}/postgres": "Connect call failed",
        "mysql://rise:secret@127.0.0.1/x": "is a URL of mysql", "secret": "Could not parse",
    }.items():  # fmt: skip
        options = ["--port", str(free_port()), "--home", str(tmp_path), "--database", url]
        done = CliRunner().invoke(rise, ["serve", *options])
        assert isinstance(done.exception, InputError), url
        assert problem in str(done.exception)
        assert "secret" not in str(done.exception)
