"""What a stage costs, measured the same way for every method: wall time, seconds of search, peak memory, bytes kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.common.files import read_json, write_json
from tasks.common.stage import UNDIGESTED

TIMINGS = "timings.json"
"""The file of a stage that holds its :class:`Usage`; it stays out of the stage's digest."""
RESULTS = UNDIGESTED | {"scores.parquet", "per_query.parquet", "ranks.parquet", "notes.json"}
"""Files of a scored pool that are no features of its documents."""
_PEAK = "VmHWM:"


@dataclass
class Usage:
    """What a stage took. A figure that is not known is None."""

    seconds: float = 0.0
    """Wall time of the work, in seconds."""
    search_seconds: float | None = None
    """Part of it spent in :func:`searching`, in seconds."""
    peak_mib: float | None = None
    """Most memory in use at once, in MiB: the accelerator's where this process has one, else this process's resident
    set, the interpreter and its libraries included. Of a child process what :func:`count_child` is told."""
    bytes_a_document: float | None = None
    """Bytes kept on disk for a document of the pool."""
    queries: int | None = None
    """Queries that were searched for."""

    def write(self, directory: Path) -> None:
        """Keep it as ``directory/timings.json``."""
        write_json(directory / TIMINGS, asdict(self), checked=True)


def read_usage(directory: Path) -> Usage:
    """What :meth:`Usage.write` kept; everything unknown where a stage measured nothing."""
    file = directory / TIMINGS
    known: dict[str, Any] = read_json(file) if file.is_file() else {}
    return Usage(**{name: known[name] for name in asdict(Usage()) if name in known})


_current: ContextVar[Usage | None] = ContextVar("usage", default=None)


@contextmanager
def measured() -> Iterator[Usage]:
    """Measure what is done inside; the figures stand when it ends."""
    usage = Usage()
    token = _current.set(usage)
    known = _reset_peak()
    start = time.perf_counter()
    try:
        yield usage
    finally:
        _current.reset(token)
    usage.seconds = time.perf_counter() - start
    usage.peak_mib = max(_peak_mib(), usage.peak_mib or 0.0) if known else None


@contextmanager
def searching() -> Iterator[None]:
    """Count what is done inside as search: from what is kept of documents and queries to scores. A calibration that is
    fitted on the way counts too; reading the queries out does not. Outside of :func:`measured` it counts nothing."""
    start = time.perf_counter()
    yield
    usage = _current.get()
    if usage is not None:
        usage.search_seconds = (usage.search_seconds or 0.0) + time.perf_counter() - start


def count_child(peak_mib: float | None, search_seconds: float | None) -> None:
    """Count what a process of its own took, as :func:`measured` told there: its peak and its seconds of search."""
    usage = _current.get()
    if usage is not None:
        usage.peak_mib = max(peak_mib or 0.0, usage.peak_mib or 0.0)
        if search_seconds is not None:
            usage.search_seconds = (usage.search_seconds or 0.0) + search_seconds


def kept_bytes(directory: Path) -> int:
    """Bytes that a method keeps of the pool: all files below a scored pool's directory but :data:`RESULTS` and what
    lies in a folder ``queries``."""
    files = (file for file in directory.rglob("*") if file.is_file() and file.name not in RESULTS
             and file.suffix != ".sha256")  # fmt: skip
    return sum(file.stat().st_size for file in files if "queries" not in file.relative_to(directory).parts)


def _accelerator() -> Any:
    """torch.cuda where this process has loaded it and there is a device, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _reset_peak() -> bool:
    """Forget the peaks seen so far; False where the system does not tell them."""
    if (cuda := _accelerator()) is not None:
        cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_mib() -> float:
    if (cuda := _accelerator()) is not None:
        return float(cuda.max_memory_allocated() / 2**20)
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(_PEAK)).split()[1]) / 1024
