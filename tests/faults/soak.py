"""Curation two hundred times over a source that grows: memory, open files and the time of a run stay what they were.

``rise serve``'s worker gives every run a process of its own, which forgets everything; here all runs share one process,
so that whatever a run does not give back shows. A night's documents are as many as the night's before.

The machine is shared, and what a second of it is worth changes within minutes. So the last runs are timed against the
same night of a curation that is young: it has been run for :data:`YOUNG` nights, and a copy of it is run once more
after each of the old one's last :data:`TIMED` runs. At that age the picture in the UI has all the runs that it shows,
and the check of earlier runs all those that it looks at.
"""

from __future__ import annotations

import shutil
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
YOUNG = 40
"""Nights of the curation that the last runs are timed against."""
TIMED = 30
"""Runs that are timed against it."""


class _Meter:
    """What runs took, in this process."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.seconds: list[float] = []
        self.worked: list[float] = []
        self.memory: list[float] = []
        self.files: list[int] = []

    def night(self, conf: Path, out: Path, number: int) -> None:
        """Run a curation, which must come to this number."""
        from flows.curation import curation  # Prefect reads the server's address when it is imported

        begun, before = time.perf_counter(), sum(self._process.cpu_times()[:2])
        outcome = curation(str(conf), str(out))
        self.seconds.append(time.perf_counter() - begun)
        self.worked.append(sum(self._process.cpu_times()[:2]) - before)
        self.memory.append(self._process.memory_info().rss / 2**20)
        self.files.append(self._process.num_fds())
        if outcome["run"] != number + 1:
            raise RuntimeError(f"night {number + 1} made run {outcome['run']}")


def run(runs: int = RUNS, young: int = YOUNG, timed: int = TIMED) -> dict[str, Any]:
    """What every run took; the last against a young curation's, and memory against that of the tenth to thirtieth."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = world.models(folder)
        with world.server(folder / "prefect"):
            import torch

            torch.set_num_threads(1)
            inboxes = {age: folder / age / "inbox" for age in ("old", "young")}
            for inbox in inboxes.values():
                inbox.parent.mkdir()
            confs = {age: world.curation_conf(inbox.parent, made, inbox) for age, inbox in inboxes.items()}
            warm, old, again = _Meter(), _Meter(), _Meter()
            for number in range(young + 1):
                world.arrive(inboxes["young"], number, documents=DOCUMENTS)
                if number < young:
                    warm.night(confs["young"], folder / "young/out", number)
            for number in range(runs):
                world.arrive(inboxes["old"], number, documents=DOCUMENTS)
                old.night(confs["old"], folder / "old/out", number)
                if number >= runs - timed:
                    shutil.copytree(folder / "young/out", folder / "again")
                    again.night(confs["young"], folder / "again", young)
                    shutil.rmtree(folder / "again")
    early, late = slice(runs // 20, runs // 20 + 20), slice(-timed, None)
    shown = sorted({0, *range(runs // 10 - 1, runs, max(1, runs // 10))})
    median = statistics.median
    return {
        "runs": runs, "new documents a run": DOCUMENTS,
        "memory, ratio": round(statistics.mean(old.memory[late]) / statistics.mean(old.memory[early]), 3),
        "open files": {"first run": old.files[0], "tenth": old.files[min(9, runs - 1)], "last": old.files[-1]},
        f"the last {timed} runs against run {young + 1}, in turn": {
            what: {"old": round(median(one[late]), 3), "young": round(median(other), 3),
                   "ratio": round(median(one[late]) / median(other), 3)}
            for what, one, other in (("seconds a run", old.seconds, again.seconds),
                                     ("processor seconds a run", old.worked, again.worked))},
        "by run": {str(place + 1): {"MiB": round(old.memory[place]), "open files": old.files[place],
                                    "seconds": round(old.seconds[place], 2),
                                    "processor seconds": round(old.worked[place], 2)} for place in shown},
    }  # fmt: skip
