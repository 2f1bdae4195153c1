"""A rival's library in a process of its own: its memory goes when it ends, and its messages go to a log."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.files import read_json, whole_file, write_json
from tasks.common.progress import Progress, Report
from tasks.common.usage import count_child, measured
from tasks.scoring.batching import Tokenized

DONE, USED = "documents-done", "used"
"""First words of the lines by which the process tells that so many more documents are done, and what it used."""
INSTALL = "pip install '.[rivals]' && pip install --no-deps bergson==2.5.1 kronfluence==1.0.1"
"""In two steps: what both libraries declare would replace torch, or put a torchvision beside it that breaks it."""


def require(library: str, method: str) -> None:
    """Refuse at once what the installation lacks.

    Raises:
        InputError: the library is not installed.
    """
    if importlib.util.find_spec(library) is None:
        raise InputError(f"the method {method} needs {library}, which is not installed; in the checkout: {INSTALL}")


def write_tokens(documents: Tokenized, rows: list[int], file: Path) -> None:
    """Keep the tokens of some documents for the process; read them with :func:`read_tokens`."""
    ids = [documents.ids(place) for place in rows]
    with whole_file(file) as part, part.open("wb") as opened:
        np.savez(opened, flat=np.concatenate(ids), ends=np.cumsum([len(some) for some in ids]))


def read_tokens(file: Path) -> list[NDArray[np.int32]]:
    """The tokens of each document."""
    kept = np.load(file, allow_pickle=False)
    return np.split(kept["flat"], kept["ends"][:-1])


def run_child(
    module: str, given: dict[str, Any], log: Path, *, label: str, documents: int, unit: str = "documents",
    threads: int | None = None, report: Report | None = None,
) -> None:  # fmt: skip
    """Run ``python -m MODULE``, whose main part is :func:`serve`, and wait for it; it ends when this process does.

    Args:
        module: the module.
        given: what it is told, JSON types.
        log: file for what the library writes; it is removed when all went well.
        label: what is being done, in a word or two.
        documents: how many it will go through, all passes together.
        unit: what is counted, where it is not documents.
        threads: CPU threads; None leaves the library's choice.
        report: told the share done.

    Raises:
        InputError: what the process raised.
        RuntimeError: it failed in another way; the line says how, and where the log is.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    root = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        spec, failure = Path(scratch) / "spec.json", Path(scratch) / "failure.json"
        write_json(spec, {"given": given, "failure": str(failure)})
        with (
            log.open("a", buffering=1) as messages,
            Progress(label, documents, unit, report=report) as progress,
            # A group of its own: it ends as one, with the processes that the library may start.
            subprocess.Popen([sys.executable, "-m", module, str(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=messages, text=True, env=environment, start_new_session=True) as process,
        ):  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                word, _, count = line.partition(" ")
                if word == DONE:
                    progress.add(int(count))
                elif word == USED:
                    count_child(**json.loads(count))
                else:
                    messages.write(line)
        if process.returncode == 0:
            log.unlink()
            return
        found = read_json(failure) if failure.exists() else {}
    if "problem" in found:
        raise InputError(**found)
    killed = "killed by the system, most likely for want of memory" if process.returncode == -signal.SIGKILL else None
    said = found.get("said") or killed or f"ended with status {process.returncode}"
    raise RuntimeError(f"{label} failed: {said} (its log: {log})")


def serve(work: Callable[[dict[str, Any]], None]) -> None:
    """The main part of a module that :func:`run_child` runs."""
    spec = read_json(Path(sys.argv[1]))
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        with measured() as usage:
            work(spec["given"])
        print(USED, json.dumps({"peak_mib": usage.peak_mib, "search_seconds": usage.search_seconds}), flush=True)
    except InputError as error:
        write_json(Path(spec["failure"]), {
            "problem": error.problem, "file": error.file, "row": error.row, "field": error.field})  # fmt: skip
        sys.exit(1)
    except Exception as error:
        write_json(Path(spec["failure"]), {"said": f"{type(error).__name__}: {error}"})
        raise


def tell(documents: int) -> None:
    """Say that so many more documents are done."""
    print(DONE, documents, flush=True)


def _end_with_the_parent() -> None:
    """Standard input is a pipe that nobody writes to: it ends when the process at its other end is gone."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
