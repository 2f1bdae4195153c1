"""SIGKILL at random moments of a closed loop and of a curation: they end as if left alone, and make nothing twice."""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults import world
from tests.faults.world import Alone, Command, Scenario

KILLS = 50
"""Of the closed loop, and as many of curation."""
SEED = 7


def run(kills: int = KILLS) -> dict[str, Any]:
    """Figures of both."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = world.models(folder)
        with world.server(folder / "prefect"):
            for scenario in (world.closed_loop(folder, made), world.curation(folder, made)):
                left = world.left_alone(scenario, folder / scenario.name.replace(" ", "-"))
                figures[scenario.name] = killed(scenario, left, folder / "killed", kills, random.Random(SEED))
    for what in ("tried", "survived", "lost", "recomputed"):
        figures[what] = sum(figures[scenario][what] for scenario in ("closed loop", "curation"))
    return figures


def killed(scenario: Scenario, left: Alone, folder: Path, kills: int, moments: random.Random) -> dict[str, Any]:
    """Kill a scenario so many times, each time at a moment drawn over the time that the night takes undisturbed.

    A run that was killed is started again, to be killed again or to end; when one has ended the next directory begins.
    A kill is survived when the run that it hit ends with the digests of the one left alone.
    """
    tried = survived = trials = looked = 0
    lost: list[str] = []
    remade: Counter[str] = Counter()
    hit: Counter[str] = Counter()
    while tried < kills:
        trials += 1
        directory, here, problem = folder / f"{scenario.name.replace(' ', '-')}-{trials}", 0, None
        for night, come in enumerate(scenario.nights):
            come()
            while True:
                before = world.whole(directory)
                looked += len(before)
                command = Command(scenario.command(directory), directory.with_suffix(".log"))
                moment = moments.uniform(0, left.seconds[night]) if tried < kills else world.HANGS_SECONDS
                done = command.wait(moment)
                if done is None:
                    command.kill()
                remade.update(world.again(before, world.whole(directory)))
                if done is not None:
                    break
                if moment == world.HANGS_SECONDS:
                    problem = "hangs"
                    break
                tried, here = tried + 1, here + 1
                hit[_under_way(directory)] += 1
            problem = problem or (None if done is not None and done.status == 0 else done.last if done else "hangs")
            if problem:
                break
        if problem is None and (left_over := world.litter(directory, left.directory)):
            problem = f"left behind: {', '.join(left_over)}"
        if problem is None and scenario.digests(directory) != left.digests:
            problem = "another digest"
        print(f"{scenario.name}, run {trials}, {here} kills: {problem or 'survived'}", file=sys.stderr, flush=True)
        if problem is None:
            survived += here
        else:
            lost.append(f"run {trials}, killed {here} times: {problem.replace(str(folder), '')}")
            if not here:
                raise RuntimeError(f"{scenario.name} fails without a fault: {lost[-1]}")
    return {"tried": tried, "survived": survived, "lost": tried - survived, "recomputed": remade.total(),
            "runs": trials, "whole files looked at": looked, "seconds undisturbed": [round(s, 1) for s in left.seconds],
            "under way when killed": dict(sorted(hit.items())),
            **({"what was lost": lost} if lost else {}),
            **({"what was made again": dict(remade)} if remade else {})}  # fmt: skip


def _under_way(directory: Path) -> str:
    """The stage that a kill hit, as far as the files say."""
    partial = sorted(path.relative_to(directory).as_posix().removesuffix(".partial")
                     for path in directory.rglob("*.partial"))  # fmt: skip
    if partial:
        return partial[0].partition("/")[0] if not partial[0].startswith("runs/") else partial[0].rpartition("/")[2]
    if any(not (plan.parent / "manifest.json").exists() or (plan.parent / "append.json").exists()
           for plan in directory.glob("indexes/*/plan.json")):  # fmt: skip
        return "index"
    return "between stages" if directory.exists() else "before the directory"
