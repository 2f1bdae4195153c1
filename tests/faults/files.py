"""Files of a run, a curation and an index that are truncated or have a bit turned, one of each kind at a time.

A file is found damaged and named in one line, or made again; whatever is made of it in the end has the digest of a run
that was left alone.
"""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

from tests.faults import world
from tests.faults.damage import SEED, Alone, Fault, Scenario, Setting, Tally, begin, last, refusal, tried
from tests.faults.world import Command, rise


def run() -> dict[str, Any]:
    """Figures of what is whole and of what is unfinished."""
    return tried(FAULTS)


def kinds(directory: Path, below: str = "") -> dict[str, Path]:
    """The last file of each kind (of selections the one that stands), by its place without arms, hashes and numbers."""
    found: dict[str, Path] = {}
    for path in sorted((directory / below).rglob("*")):
        if path.is_file() and path.name != ".lock" and path.stat().st_size:
            place = path.relative_to(directory).as_posix()
            kind = re.sub(r"\b([0-9a-f]{8,}|\d+)\b", "#", re.sub(r"^(\w+)/[\w-]+(\.partial)?/", r"\1/*\2/", place))
            found[kind] = path
    return found


def spoil(path: Path, manner: str, generator: random.Random) -> bytes:
    """Cut a file in half, or turn one bit of it; its bytes are returned."""
    content = bytearray(path.read_bytes())
    if manner == "truncated":
        del content[len(content) // 2 :]
    else:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    return bytes(content)


def damaged(
    tally: Tally, setting: Setting, scenario: Scenario, left: Alone, state: Path, below: str = "", title: str = "",
) -> None:  # fmt: skip
    """Spoil one file of each kind in a copy of a directory, and run the command on."""
    generator = random.Random(SEED)
    for kind, path in kinds(state, below).items():
        for manner in ("truncated", "flipped"):
            directory = setting.fresh("damaged")
            shutil.copytree(state, directory, symlinks=True)
            file = directory / path.relative_to(state)
            content = spoil(file, manner, generator)
            done = rise(scenario.command(directory), directory.with_suffix(".log"))
            what = f"{scenario.name}{title}: {kind} {manner}"
            if done.status == 0:
                used = file.exists() and file.read_bytes() == content
                tally.count(what, "not used by the run" if used else "made again",
                            None if scenario.digests(directory) == left.digests else "another digest")  # fmt: skip
            else:
                places = [file, *file.parents]
                inside = [str(place) for place in places[: places.index(directory)]]
                tally.count(what, "named in one line", refusal(done, *inside))


def finished(setting: Setting, tally: Tally) -> None:
    """Every kind of file that a closed loop leaves when it is over, and a curation for its last night."""
    loop, left = setting.scenarios["closed loop"]
    damaged(tally, setting, loop, left, left.directory)
    curation, left = setting.scenarios["curation"]
    state = setting.folder / "before-the-last"
    begin(curation, state, last(curation))
    damaged(tally, setting, curation, left, state)


def early(setting: Setting, tally: Tally) -> None:
    """Every kind of file of a curation of one night, which still has an index of floats; the second gives it up."""
    scenario = world.curation(setting.folder, setting.models, nights=2)
    left = world.left_alone(scenario, setting.folder / "two-nights")
    state = setting.folder / "first-night"
    begin(scenario, state, last(scenario))
    damaged(tally, setting, scenario, left, state, title=" first night")


def unfinished(setting: Setting, tally: Tally) -> None:
    """Every kind of file that a killed run left unfinished."""
    loop, left = setting.scenarios["closed loop"]
    state = setting.folder / "unfinished"
    shutil.copytree(left.directory, state)
    opened = ("scoring/readout", "evaluation/bits")
    for name in opened:
        stage = (state / name).rename(state / f"{name}.partial")
        (stage / "manifest.json").unlink()
        for manifest in stage.rglob("manifest.json"):  # of an index
            manifest.unlink()
            shards = sorted(manifest.parent.glob("shards/*.json"))
            for file in manifest.parent.glob(f"shards/{shards[-1].stem}.*") if len(shards) > 1 else ():
                file.unlink()
    for name in ("metrics.parquet", "notes.json"):
        (state / "evaluation/bits.partial" / name).unlink()
    for name in opened:
        damaged(tally, setting, loop, left, state, f"{name}.partial", " unfinished")
    for name, (scenario, left), pattern, below in (
        ("conversion", setting.scenarios["closed loop"], "scoring/bits.partial/index/calibration.npy", "scoring"),
        ("training", setting.scenarios["closed loop"], "pretraining/*.partial/checkpoint/*.safetensors", "pretraining"),
        ("append", setting.scenarios["curation"], "indexes/*/append.json", "indexes"),
    ):
        state = setting.folder / f"unfinished-{name}"
        begin(scenario, state, last(scenario))
        command = Command(scenario.command(state), state.with_suffix(".log"))
        while not list(state.glob(pattern)) and command.wait(0.002) is None:
            pass
        command.kill()
        if not list(state.glob(pattern)):
            raise RuntimeError(f"no {pattern} was seen")
        damaged(tally, setting, scenario, left, state, below, f" unfinished {name}")


def index(setting: Setting, tally: Tally) -> None:
    """Every kind of file of an index; ``rise index verify`` names it."""
    generator = random.Random(SEED)
    state, log = setting.folder / "index", setting.folder / "index.log"
    for data, number in (("first", 1), ("more", 2)):
        world.arrive(setting.folder / data, number, documents=20)
    sketch = [part for name, value in world.SIGNATURE.items() for part in (f"--{name}", value)]
    built = rise(["index", "build", "--model", setting.models["scorer"], "--data", setting.folder / "first/0001.jsonl",
                  "--out", state, "--dtype", "bit", "--calibration", "median-bit+spread", "--precision", "float32",
                  "--shard-tokens", 400, *sketch], log)  # fmt: skip
    added = rise(["index", "append", state, "--data", setting.folder / "more/0002.jsonl"], log)
    if built.status != 0 or added.status != 0:
        raise RuntimeError(f"an index fails without a fault: {built.said} {added.said}")
    for kind, path in kinds(state).items():
        if kind.endswith(".sha256"):
            continue  # says what another file is; verify looks into the manifest
        for manner in ("truncated", "flipped"):
            directory = setting.fresh("damaged")
            shutil.copytree(state, directory)
            file = directory / path.relative_to(state)
            spoil(file, manner, generator)
            done = rise(["index", "verify", directory], directory.with_suffix(".log"))
            tally.count(f"index: {kind} {manner}", "named in one line", refusal(done, str(file)))


FAULTS: dict[str, Fault] = {"finished": finished, "early": early, "unfinished": unfinished, "index": index}
