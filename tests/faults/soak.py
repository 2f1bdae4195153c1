"""Curation two hundred times over a source that grows: memory, open files and the time of a run stay what they were.

``rise serve``'s worker gives every run a process of its own, which forgets everything; here all runs share one process,
so that whatever a run does not give back shows. A night's documents are as many as the night's before; what grows is
what a run looks at of earlier ones: it searches and checks everything that was ever taken in.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from tests.faults import world

RUNS = 200
DOCUMENTS = 8
"""New ones a night."""


def run(runs: int = RUNS) -> dict[str, Any]:
    """What every run took, and ratios of the last twenty runs to the tenth to thirtieth."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = world.models(folder)
        inbox = folder / "inbox"
        conf = world.curation_conf(folder, made, inbox)
        with world.server(folder / "prefect"):
            import torch

            from flows.curation import curation  # Prefect reads the server's address when it is imported

            torch.set_num_threads(1)
            process = psutil.Process()
            seconds: list[float] = []
            worked: list[float] = []
            memory: list[float] = []
            files: list[int] = []
            for number in range(runs):
                world.arrive(inbox, number, documents=DOCUMENTS)
                begun, before = time.perf_counter(), sum(process.cpu_times()[:2])
                outcome = curation(str(conf), str(folder / "out"))
                seconds.append(time.perf_counter() - begun)
                worked.append(sum(process.cpu_times()[:2]) - before)
                memory.append(process.memory_info().rss / 2**20)
                files.append(process.num_fds())
                if outcome["run"] != number + 1:
                    raise RuntimeError(f"night {number + 1} made run {outcome['run']}")
    early, late = slice(runs // 20, runs // 20 + 20), slice(-20, None)
    shown = sorted({0, *range(runs // 10 - 1, runs, max(1, runs // 10))})
    return {
        "runs": runs, "new documents a run": DOCUMENTS,
        "memory, ratio": round(statistics.mean(memory[late]) / statistics.mean(memory[early]), 3),
        "seconds a run, ratio": round(statistics.mean(seconds[late]) / statistics.mean(seconds[early]), 3),
        "seconds a run, ratio of medians":
            round(statistics.median(seconds[late]) / statistics.median(seconds[early]), 3),
        "processor seconds a run, ratio of medians":  # these hardly know of what else the machine does
            round(statistics.median(worked[late]) / statistics.median(worked[early]), 3),
        "open files": {"first run": files[0], "tenth": files[min(9, runs - 1)], "last": files[-1]},
        "by run": {str(place + 1): {"MiB": round(memory[place]), "open files": files[place],
                                    "seconds": round(seconds[place], 2),
                                    "processor seconds": round(worked[place], 2)} for place in shown},
    }  # fmt: skip
