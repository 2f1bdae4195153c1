"""A stage's directory: worked on as ``NAME.partial``, renamed to ``NAME`` when its manifest stands in it.

What a stage made is found again by a key over its own version, its configuration and the digests of its inputs,
so a run that was killed goes on with what is whole, whichever process or Prefect server asks.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tasks.common.errors import InputError
from tasks.common.files import read_json, remove_parts, sha256_file, sha256_json, write_json

MANIFEST = "manifest.json"
WORK_KEY = "work.json"
UNDIGESTED = frozenset({MANIFEST, WORK_KEY, "timings.json"})
"""Files that differ between two equal runs (times, notes of the machine) and so stay out of a digest."""


@dataclass(frozen=True)
class Ref:
    """A reference to what one stage made: all that travels between stages."""

    stage: str
    """Stage name: pool, scoring, selection, pretraining, evaluation, reporting."""
    method: str
    """Arm or method the stage ran for; empty where the stage serves all of them."""
    path: str
    """Directory that holds the stage's files."""
    digest: str
    """SHA-256 over the names and contents of the stage's files."""
    rows: int
    """Rows of the stage's main table (documents, steps, metrics)."""
    key: str
    """SHA-256 over stage version, configuration and input digests."""
    seconds: float
    """Wall time it took to make, in seconds."""
    cached: bool = False
    """True when it was found whole and not made again."""

    @property
    def dir(self) -> Path:
        """``path`` as a Path."""
        return Path(self.path)


def stage_key(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Key of a stage's result: its name, version, configuration (JSON types) and the digests of its inputs."""
    return sha256_json({"stage": stage, "version": version, "config": config, "inputs": inputs})


def digest_directory(directory: Path) -> str:
    """SHA-256 over the relative names and contents of all files below ``directory`` but :data:`UNDIGESTED` and those
    whose names begin with a dot."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in UNDIGESTED
                   and not path.name.startswith("."))  # fmt: skip
    return sha256_json([[path.relative_to(directory).as_posix(), sha256_file(path)] for path in files])


def find(directory: Path, key: str) -> Ref | None:
    """The reference to a whole result with this key, or None; a result that is damaged is none, and is told of."""
    try:
        manifest = read_json(directory / MANIFEST)
        if manifest.get("key") != key:
            return None
        ref = Ref(**{**manifest["ref"], "path": str(directory), "cached": True})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, LookupError, AttributeError):
        print(f"{directory / MANIFEST}: is damaged", file=sys.stderr)
        return None
    if digest_directory(directory) != ref.digest:
        print(f"{directory}: is damaged: a file in it is not what was written", file=sys.stderr)
        return None
    return ref


def whole_or_none(directory: Path) -> Ref | None:
    """The reference to a whole result, whatever it was made from, or None."""
    try:
        return find(directory, str(read_json(directory / MANIFEST)["key"]))
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None


def whole(directory: Path) -> Ref:
    """The same of a result that must be there.

    Raises:
        InputError: it is not, or a file of it has changed.
    """
    ref = whole_or_none(directory)
    if ref is None:
        raise InputError("is damaged, or not whole; restore it from a copy", file=directory)
    return ref


def run_stage(
    directory: Path,
    *,
    stage: str,
    version: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    work: Callable[[Path], int],
    method: str = "",
    refresh: bool = False,
) -> Ref:
    """Return the whole result in ``directory``, or make it.

    Args:
        directory: where the result shall stand.
        config: the stage's configuration as JSON types; part of the key.
        inputs: name → digest of everything read; part of the key.
        work: called with a working directory, returns the number of rows. The directory of a killed call with the
            same key is handed in again with what was finished in it, so ``work`` can go on; one of another key is
            thrown away.
        refresh: make it again although it is whole.
    """
    key = stage_key(stage, version, config, inputs)
    if not refresh and (found := find(directory, key)) is not None:
        return found
    partial = directory.with_name(directory.name + ".partial")
    if refresh or read_key(partial) != key:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(partial / WORK_KEY, {"key": key})
    elif (made := find(partial, key)) is not None:  # killed before it was given its name
        _put(partial, directory)
        return replace(made, path=str(directory), cached=False)
    (partial / MANIFEST).unlink(missing_ok=True)
    remove_parts(partial)
    start = time.perf_counter()
    rows = work(partial)
    seconds = time.perf_counter() - start
    ref = Ref(stage, method, str(directory), digest_directory(partial), rows, key, round(seconds, 3))
    write_json(
        partial / MANIFEST,
        {"key": key, "version": version, "config": config, "inputs": inputs, "ref": {**asdict(ref), "path": "."}},
        checked=True,
    )
    _put(partial, directory)
    return ref


def _put(partial: Path, directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(partial, directory)


def read_key(partial: Path) -> str | None:
    """The key that unfinished work was begun with, or None."""
    try:
        return str(read_json(partial / WORK_KEY)["key"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
