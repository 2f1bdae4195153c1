"""Files that are whole or absent, and the digests that say what is in them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.common.errors import DamagedError, InputError

_CHUNK = 1 << 20
_CHECKSUM = "checksum"
LOCK = ".lock"
"""The file in a directory by which a process holds it."""


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spare blanks: the same value is always the same string."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of :func:`canonical_json`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@contextmanager
def whole_file(path: Path, *, noted: bool = False) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; on success it is flushed to disk and renamed to ``path``.

    A reader sees the old file or the new one, never a part. On an error the part is removed.

    Args:
        path: the file.
        noted: keep its SHA-256 beside it, as NAME.sha256 in the form that ``sha256sum -c`` reads, for :func:`intact`.

    Raises:
        InputError: the disk is full, or the directory cannot be written to.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        if noted:  # first: a file that stands has its note
            write_text(_noted(path), f"{sha256_file(part)}  {path.name}\n")
        os.replace(part, path)
    except OSError as error:
        problem = error.strerror or str(error)
        raise InputError(f"cannot be written ({problem}); what is whole is kept, the same command goes on",
                         file=path) from error  # fmt: skip
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def check_output(path: Path, *inputs: Path | None) -> None:
    """Refuse a file to write that is a directory, or one of the files that are read, before anything is computed.

    Raises:
        InputError: naming it.
    """
    if path.is_dir():
        raise InputError("is a directory; name a file to write", file=path)
    for one in inputs:
        if one is not None and os.path.realpath(path) == os.path.realpath(one):
            raise InputError("would be written over a file that is read, or written twice; name another", file=path)


@contextmanager
def nothing_left(directory: Path) -> Iterator[None]:
    """Remove what the block made in ``directory`` where bad input ends it.

    A directory that held something before is left alone, and so is one where the machine is at fault (disk, memory):
    what is whole in it is used when the same command goes on.
    """
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    fresh = directory in missing or (directory.is_dir() and {path.name for path in directory.iterdir()} <= {LOCK})
    try:
        yield
    except InputError as error:
        if fresh and not isinstance(error.__cause__, OSError) and not error.problem.startswith("out of "):
            for path in directory.iterdir() if directory.is_dir() else ():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != LOCK:
                    path.unlink()
            _remove_empty(missing)
        raise


def _remove_empty(places: Sequence[Path]) -> None:
    for place in places:
        with suppress(OSError):
            place.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that the file is whole or absent."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, checked: bool = False) -> None:
    """Write readable JSON with sorted keys so that the file is whole or absent.

    Args:
        path: the file.
        value: of JSON types.
        checked: a mapping is given a checksum of its own, which :func:`read_json` looks at and takes off.
    """
    value = {**value, _CHECKSUM: sha256_json(value)} if checked else value
    write_text(path, json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that :func:`write_json` wrote.

    Raises:
        DamagedError: it is not JSON, or not what its checksum says.
        FileNotFoundError: it is not there.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DamagedError("is damaged: it is not JSON; restore it from a copy", file=path) from None
    if isinstance(value, dict) and _CHECKSUM in value and value.pop(_CHECKSUM) != sha256_json(value):
        raise DamagedError("is damaged: it is not what was written; restore it from a copy", file=path)
    return value


def intact(path: Path) -> bool:
    """Whether a file is there, and is what was noted where it was: whether it need not be made again."""
    if not path.is_file():
        return False
    noted = _noted(path)
    return not noted.exists() or noted.read_bytes() == f"{sha256_file(path)}  {path.name}\n".encode()


def forget(path: Path) -> None:
    """Take the note of a file away, where something else tells from now on whether it is intact."""
    _noted(path).unlink(missing_ok=True)


def _noted(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold ``directory``, which is made where it is not: nobody else who asks gets it meanwhile.

    One that was made for this and in which nothing was written is removed again.

    Raises:
        InputError: another process holds it.
    """
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("another run is at work in this directory", file=directory) from None
        try:
            yield
        finally:
            if missing and [path.name for path in directory.iterdir()] == [LOCK]:
                (directory / LOCK).unlink()
                _remove_empty(missing)


def remove_parts(directory: Path) -> None:
    """Remove what a killed process was writing by :func:`whole_file` below a directory that nobody is at work in."""
    for folder, _, names in os.walk(directory):
        for name in names:
            if name.startswith(".") and name.endswith((".part", ".part.wal")):
                os.unlink(os.path.join(folder, name))
