"""A run's directory: claimed by one configuration and one process, and what the run was made of."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from tasks.common.config import Config, read_yaml
from tasks.common.errors import InputError
from tasks.common.files import LOCK, locked, remove_parts, sha256_json, write_json, write_text
from tasks.common.stage import Ref

CONFIG, MANIFEST = "config.yaml", "manifest.json"
PACKAGES = ("rise-curation", "torch", "transformers", "accelerate", "datasets", "lm_eval", "bm25s",
            "sentence-transformers", "datasketch", "numkong", "duckdb", "pyarrow", "numpy", "scikit-learn",
            "prefect")  # fmt: skip
"""Packages whose versions a run records."""


@contextmanager
def claimed(directory: Path, config: Config) -> Iterator[None]:
    """Hold ``directory`` for a run of ``config``.

    Raises:
        InputError: it was made from another configuration, or another process is at work in it.
    """
    with locked(directory):
        _claim(directory / CONFIG, config.plain())
        remove_parts(directory)
        yield


def check_claim(directory: Path, config: Config) -> None:
    """Refuse a directory that another configuration made, before anything is started.

    Raises:
        InputError: naming the first field that differs.
    """
    if (directory / CONFIG).exists():
        _claim(directory / CONFIG, config.plain())
    elif directory.exists() and not (directory.is_dir() and all(
            path.name.startswith((LOCK, f".{CONFIG}.")) for path in directory.iterdir())):  # killed as it began
        raise InputError("is neither empty nor a run; choose another --out", file=directory)


def _claim(file: Path, values: dict[str, Any]) -> None:
    if not file.exists():
        write_text(file, yaml.safe_dump(values, sort_keys=True, allow_unicode=True))
        return
    begun, wanted = _said(read_yaml(file)), _said(values)
    if begun != wanted:
        field, old, new = next(_differences(begun, wanted))
        raise InputError(f"the run in this directory was made with {old!r}, not {new!r}; choose another --out",
                         file=file, field=field)  # fmt: skip


def _said(values: Any) -> Any:
    """Values without the fields that are None: one that a later version has, and nobody sets, makes no other run."""
    if not isinstance(values, dict):
        return values
    return {key: _said(value) for key, value in values.items() if value is not None}


def _differences(old: Any, new: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key) or (key in old) != (key in new):
                yield from _differences(old.get(key), new.get(key), f"{field}.{key}" if field else key)
    elif old != new:
        yield field, old, new


def surroundings(command: Sequence[str]) -> dict[str, Any]:
    """What a run was made with: command, versions, commit, machine, date."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": " ".join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "gpus": gpus,
                    "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)},
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str | None:
    """The commit of the checkout this code runs from, marked where files differ from it."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True,
                                 text=True, check=True).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head} (with local changes)" if changed else head


def write_manifest(directory: Path, config: Config, stages: Sequence[Ref], extra: Mapping[str, Any]) -> str:
    """Write ``manifest.json`` and return the run's digest: one SHA-256 over its configuration and all its stages."""
    digests = {f"{ref.stage}/{ref.method}".rstrip("/"): ref.digest for ref in stages}
    digest = sha256_json({"config": config.plain(), "stages": digests, **extra})
    write_json(directory / MANIFEST, {
        "digest": digest, "stages": {name: asdict(ref) for name, ref in zip(digests, stages, strict=True)},
        **extra, "surroundings": surroundings(sys.argv),
    }, checked=True)  # fmt: skip
    return digest
