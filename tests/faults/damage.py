"""What befalls a run: a full or a read-only disk, a held ledger, a server that goes, a second run, a wrong clock.

Nothing may be lost by it: the command ends by one line that names what is wrong, or goes on; and in the end it has the
digests of a run that was left alone.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import world
from tests.faults.world import Alone, Command, Done, Scenario, again, alone, litter, rise, whole

SEED = 11
SHARES = (0.02, 0.15, 0.4, 0.6, 0.75, 0.9)
"""Of the space that a run takes: where the disk is full."""
BACK = "-30d"
"""How far the clock is set back."""
FAKETIME = ("/usr/lib/*/faketime/libfaketime.so.1", "/usr/local/lib/faketime/libfaketime.so.1")
_SITE = """
import time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() - 30 * 86400
time.time_ns = lambda: _time_ns() - 30 * 86400 * 10**9
"""


@dataclass
class Tally:
    """What came of one kind of fault."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def count(self, what: str, outcome: str, problem: str | None = None) -> None:
        """Count one fault; with a problem it is lost."""
        self.tried += 1
        if problem is None:
            self.outcomes[outcome] += 1
        else:
            self.lost.append(f"{what}: {problem}")
            print(f"lost: {self.lost[-1]}", file=sys.stderr, flush=True)

    def figures(self) -> dict[str, Any]:
        """As they are stored."""
        return {"tried": self.tried, "survived": self.tried - len(self.lost), "lost": len(self.lost),
                **({"outcomes": dict(sorted(self.outcomes.items()))} if self.outcomes else {}),
                **({"what was lost": self.lost} if self.lost else {})}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a fault is tried on."""

    folder: Path
    models: dict[str, Path]
    scenarios: dict[str, tuple[Scenario, Alone]]

    def fresh(self, name: str) -> Path:
        """A directory that is not there."""
        directory = self.folder / "tried" / name
        shutil.rmtree(directory, ignore_errors=True)
        return directory


Fault = Callable[[Setting, Tally], None]


def run() -> dict[str, Any]:
    """Figures of every kind of fault."""
    return tried(FAULTS)


def tried(faults: Mapping[str, Fault]) -> dict[str, Any]:
    """Figures of some kinds of faults, each tried on a small closed loop and a small curation that were left alone."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = world.models(folder)
        with world.server(folder / "prefect"):
            scenarios = {}
            for scenario in (world.closed_loop(folder, made), world.curation(folder, made)):
                left = world.left_alone(scenario, folder / scenario.name.replace(" ", "-"))
                scenarios[scenario.name] = scenario, left
            setting = Setting(folder, made, scenarios)
            for title, fault in faults.items():
                begun = time.monotonic()
                tally = Tally()
                fault(setting, tally)
                figures[title] = {**tally.figures(), "seconds": round(time.monotonic() - begun)}
                print(f"{title}: {figures[title]}", file=sys.stderr, flush=True)
    for what in ("tried", "survived", "lost"):
        figures[what] = sum(one[what] for one in figures.values() if isinstance(one, dict))
    return figures


def begin(scenario: Scenario, directory: Path, nights: int) -> None:
    """Some nights without a fault; then what comes before the next one."""
    for night in scenario.nights[:nights]:
        night()
        done = rise(scenario.command(directory), directory.with_suffix(".log"))
        if done.status != 0:
            raise RuntimeError(f"{scenario.name} fails without a fault: {done.said}")
    if nights < len(scenario.nights):
        scenario.nights[nights]()


def last(scenario: Scenario) -> int:
    """Nights before the last."""
    return len(scenario.nights) - 1


def right(scenario: Scenario, left: Alone, directory: Path) -> str | None:
    """The command once more without a fault: None where all is as if there had been none, else what is not."""
    before = whole(directory)
    done = rise(scenario.command(directory), directory.with_suffix(".log"))
    if done.status != 0:
        return f"does not go on: {done.last}"
    if remade := again(before, whole(directory)):
        return f"made again: {', '.join(remade)}"
    if left_over := litter(directory, left.directory):
        return f"left behind: {', '.join(left_over)}"
    if scenario.digests(directory) != left.digests:
        return "another digest"
    return None


def refusal(done: Done, *names: str) -> str | None:
    """None where a command was refused in one line that has one of some words in it, else what it did."""
    if not done.refused:
        return f"status {done.status}: {' / '.join(done.said[-3:])}"
    return None if any(name in line for name in names for line in done.said) else f"does not name it: {done.last}"


# Disks ----------------------------------------------------------------------------------------------------------------


@contextmanager
def disk(place: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def remount(place: Path, options: str) -> None:
    """Change a disk under what is on it."""
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def full(setting: Setting, tally: Tally) -> None:
    """A disk that is full after a share of what a run writes; then there is space."""
    for name, (scenario, left) in setting.scenarios.items():
        size = sum(4096 * (path.stat().st_size // 4096 + 2) for path in left.directory.rglob("*"))
        for share in SHARES:
            place = setting.folder / "disk"
            with disk(place, max(8192, int(share * size))):
                directory = place / "run"
                scenario.nights[0]()
                problem, refused = None, 0
                for number, night in enumerate(scenario.nights):
                    if number:
                        night()
                    done = rise(scenario.command(directory), setting.folder / "disk.log")
                    if done.status != 0:
                        problem, refused = refusal(done, str(place)), refused + 1
                        before = whole(directory)
                        remount(place, f"size={4 * size}")
                        done = rise(scenario.command(directory), setting.folder / "disk.log")
                        if problem is None and done.status != 0:
                            problem = f"does not go on: {done.last}"
                        if problem is None and (remade := again(before, whole(directory))):
                            problem = f"made again: {', '.join(remade)}"
                remount(place, f"size={4 * size}")
                if problem is None:
                    problem = right(scenario, left, directory)
                tally.count(f"{name}, {share:.0%} of the space", "refused, then went on" if refused else "had enough",
                            problem)  # fmt: skip


def read_only(setting: Setting, tally: Tally) -> None:
    """A disk that turns read-only under a run that was killed, and one that is so from the beginning."""
    for name, (scenario, left) in setting.scenarios.items():
        for share in (0.0, 0.3, 0.6):
            place = setting.folder / "disk"
            with disk(place, 1 << 30):
                directory = place / "run"
                begin(scenario, directory, last(scenario))
                if share:
                    command = Command(scenario.command(directory), setting.folder / "disk.log")
                    if command.wait(share * left.seconds[-1]) is None:
                        command.kill()
                remount(place, "ro")
                problem = refusal(rise(scenario.command(directory), setting.folder / "disk.log"), str(place))
                remount(place, "rw")
                tally.count(f"{name}, read-only after {share:.0%}", "refused, then went on",
                            problem or right(scenario, left, directory))  # fmt: skip


# Others at work -------------------------------------------------------------------------------------------------------


def held(setting: Setting, tally: Tally) -> None:
    """A ledger that another process has open for writing."""
    for name, (scenario, left) in setting.scenarios.items():
        ledger = {"closed loop": "study.duckdb", "curation": "curation.duckdb"}[name]
        directory = setting.fresh("held")
        shutil.copytree(left.directory, directory)
        if name == "curation":
            shutil.rmtree(directory)
            begin(scenario, directory, last(scenario))
        holder = subprocess.Popen(
            [sys.executable, "-c", "import duckdb, sys; con = duckdb.connect(sys.argv[1]); print(flush=True); "
             "sys.stdin.read()", directory / ledger], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert holder.stdout is not None
        holder.stdout.readline()
        commands = [scenario.command(directory)] if name == "curation" else [["report", directory]]
        for command in commands:
            done = rise(command, directory.with_suffix(".log"))
            problem = refusal(done, ledger)
            if name == "closed loop" and problem is None:  # a run makes its ledger anew beside the one that is held
                done = rise(scenario.command(directory), directory.with_suffix(".log"))
                problem = None if done.status == 0 else done.last
            holder.kill()
            holder.wait()
            tally.count(f"{name}, {ledger} held", "refused, then went on",
                        problem or right(scenario, left, directory))  # fmt: skip


def gone(setting: Setting, tally: Tally) -> None:
    """A Prefect server that is killed in the middle of a run. Prefect's client tries six times, for a minute, before it
    gives up; here three times."""
    moments = random.Random(SEED)
    for name, (scenario, left) in setting.scenarios.items():
        for number in range(2):
            directory = setting.fresh(f"gone-{number}")
            begin(scenario, directory, last(scenario))
            log = directory.with_suffix(".log")
            with world.server(setting.folder / f"prefect-{name}-{number}") as server:
                process = alone(scenario.command(directory), log,
                                {"OMP_NUM_THREADS": "1", "PREFECT_CLIENT_MAX_RETRIES": "2"})  # fmt: skip
                while process.poll() is None and "ing in" not in log.with_suffix(".err").read_text():
                    time.sleep(0.05)
                time.sleep(moments.uniform(0.1, 0.8) * left.seconds[-1])
                os.killpg(server.pid, 9)
                begun = time.monotonic()
                try:
                    process.wait(world.HANGS_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
            done = Done(process.returncode, world.said(log.with_suffix(".err").read_text()), "",
                        time.monotonic() - begun)  # fmt: skip
            problem = None if done.status == 0 else refusal(done, "server", "API")
            outcome = "went on without it" if done.status == 0 else "ended by one line, then went on"
            tally.count(f"{name}, server gone", outcome, problem or right(scenario, left, directory))


def two(setting: Setting, tally: Tally) -> None:
    """Two commands begun into one directory at once."""
    for name, (scenario, left) in setting.scenarios.items():
        for number in range(3):
            directory = setting.fresh(f"two-{number}")
            begin(scenario, directory, last(scenario) if number else 0)
            tries = [Command(scenario.command(directory), setting.folder / f"two-{one}.log") for one in range(2)]
            ended = [command.wait() for command in tries]
            problem = None
            for done in ended:
                if done is None or done.status != 0:
                    problem = problem or (refusal(done, "at work", "neither empty") if done else "hangs")
            if not any(done is not None and done.status == 0 for done in ended):
                problem = problem or "neither came through"
            for night in scenario.nights[1:] if not number else ():
                night()
                rise(scenario.command(directory), directory.with_suffix(".log"))
            tally.count(f"{name}, two at once",
                        "one refused" if any(d and d.status for d in ended) else "one after the other",
                        problem or right(scenario, left, directory))  # fmt: skip
    _two_appends(setting, tally)


def _two_appends(setting: Setting, tally: Tally) -> None:
    """Two builds, then two appends of different documents, into one index at once."""
    for number in range(4):
        world.arrive(setting.folder / "data", number, documents=20)
    data = [setting.folder / "data" / f"{number:04d}.jsonl" for number in range(4)]
    sketch = [part for name, value in world.SIGNATURE.items() for part in (f"--{name}", value)]
    for number in range(2):
        out = setting.fresh(f"index-{number}")
        build = ["index", "build", "--model", setting.models["scorer"], "--data", data[0], "--out", out, "--precision",
                 "float32", "--shard-tokens", 300, *sketch]  # fmt: skip
        appends = [["index", "append", out, "--data", data[1]], ["index", "append", out, "--data", data[2 + number]]]
        for what, pair in (("builds", [build, build]), ("appends", appends)):
            tries = [Command(command, setting.folder / f"two-{place}.log") for place, command in enumerate(pair)]
            ended = [command.wait() for command in tries]
            problem = None
            for done, command in zip(ended, pair, strict=True):
                if done is None:
                    problem = "hangs"
                elif done.status != 0:
                    problem = problem or refusal(done, "at work", "neither empty")
                    again_ = rise(command, setting.folder / "two.log")
                    problem = problem or (None if again_.status == 0 else again_.last)
            verified = rise(["index", "verify", out], setting.folder / "two.log")
            wanted = 20 if what == "builds" else 60
            if f"{wanted} documents whole" not in verified.out:
                problem = problem or f"{verified.out} {verified.last}"
            tally.count(f"index, two {what} at once", "one refused" if any(d and d.status for d in ended)
                        else "one after the other", problem)  # fmt: skip


def clock(setting: Setting, tally: Tally) -> None:
    """A clock that is thirty days back when a killed run goes on, and right again the night after."""
    library = next((str(file) for pattern in FAKETIME for file in Path("/").glob(pattern[1:])), None)
    if library is not None:
        environment = {"LD_PRELOAD": library, "FAKETIME": BACK, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    else:
        (setting.folder / "site").mkdir(exist_ok=True)
        (setting.folder / "site" / "sitecustomize.py").write_text(_SITE)
        path = [str(setting.folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(path)}
    for name, (scenario, left) in setting.scenarios.items():
        directory = setting.fresh("clock")
        begin(scenario, directory, last(scenario) and 1)
        log = directory.with_suffix(".log")
        command = Command(scenario.command(directory), log)
        if command.wait(0.5 * left.seconds[min(1, last(scenario))]) is None:
            command.kill()
        before = whole(directory)
        process = alone(scenario.command(directory), log, {**environment, "OMP_NUM_THREADS": "1"})
        with suppress(subprocess.TimeoutExpired):
            process.wait(2 * world.HANGS_SECONDS)  # libfaketime slows everything down
        problem = None if process.returncode == 0 else " / ".join(world.said(log.with_suffix(".err").read_text())[-3:])
        if problem is None and (remade := again(before, whole(directory))):
            problem = f"made again: {', '.join(remade)}"
        for night in scenario.nights[2:]:
            night()
            rise(scenario.command(directory), log)
        how = "by libfaketime" if library else "by time.time"
        tally.count(f"{name}, clock set back", f"went on, {how}", problem or right(scenario, left, directory))


FAULTS: dict[str, Fault] = {
    "disk full": full, "disk read-only": read_only, "ledger held by another process": held,
    "server gone in the middle": gone, "two at once": two, "clock set back": clock,
}
