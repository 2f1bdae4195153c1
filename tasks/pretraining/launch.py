"""Several processes on this machine under torchrun, each of them running the loop of :mod:`tasks.pretraining.train`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tasks.common.errors import InputError
from tasks.common.files import read_json, write_json
from tasks.common.progress import Report
from tasks.pretraining.config import PretrainingConfig

SHARE = "share-done"
"""First word of the lines by which the main worker tells the share done."""


def launch(config: PretrainingConfig, documents: Path, out: Path, *, report: Report | None = None) -> None:
    """Train with ``config.processes`` workers and wait for them.

    The workers end when this process does, even when it is killed: they watch the pipe to it.

    Raises:
        InputError, RuntimeError: what the main worker raised, or that the workers failed in another way.
    """
    with tempfile.TemporaryDirectory() as scratch:
        spec, failure = Path(scratch) / "spec.json", Path(scratch) / "failure.json"
        write_json(spec, {
            "config": config.plain(), "documents": str(documents.resolve()), "out": str(out.resolve()),
            "failure": str(failure),
        })  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node", str(config.processes),
                   "-m", "tasks.pretraining.worker", "--spec", str(spec)]  # fmt: skip
        with subprocess.Popen(
            command, env=_environment(config.processes), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                word, _, share = line.partition(" ")
                if word != SHARE:
                    sys.stderr.write(line)
                elif report is not None:
                    report(float(share))
        if process.returncode == 0:
            return
        if not failure.exists():
            raise RuntimeError(
                f"training with {config.processes} processes ended with status {process.returncode}; "
                "the workers' own messages are on stderr"
            )
        found = read_json(failure)
        if found["kind"] == "input":
            raise InputError(found["problem"], file=found["file"], row=found["row"], field=found["field"])
        raise RuntimeError(found["problem"])


def _environment(processes: int) -> dict[str, str]:
    """This environment, with its share of the threads for a worker (torchrun gives one) and this project importable."""
    root = str(Path(__file__).resolve().parents[2])
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": path}
