"""``rise status``: the stages of a run, without Prefect."""

from __future__ import annotations

from pathlib import Path

from flows.rundir import CONFIG, MANIFEST
from tasks.common import stage as stages
from tasks.common.errors import InputError
from tasks.common.files import read_json

ORDER = ("pool", "scoring", "selection", "pretraining", "evaluation")


def status_lines(directory: Path | None) -> list[str]:
    """One line a stage of one run, or one line a run below ``runs/``.

    Raises:
        InputError: the directory holds no run.
    """
    if directory is None:
        runs = sorted(path.parent for path in Path("runs").glob(f"*/{CONFIG}"))
        if not runs:
            raise InputError("no run stands below runs/; `rise run CONF` makes one")
        return [f"{run}: {'whole' if (run / MANIFEST).exists() else 'not finished'}" for run in runs]
    if not (directory / CONFIG).exists():
        raise InputError("holds no run", file=directory)
    lines = [f"{directory}: {'whole' if (directory / MANIFEST).exists() else 'not finished'}"]
    for name in ORDER:
        folders = sorted((directory / name).glob("*"))
        if name == "pool":  # of a run; a study has a folder a pool in it
            folders = [directory / name, directory / "pool.partial", *folders]
        for folder in folders:
            if not folder.is_dir():
                continue
            title = folder.relative_to(directory).as_posix().removesuffix(".partial")
            if folder.name.endswith(".partial"):
                done = len(list(folder.glob("**/shards/*.json")))
                lines.append(f"  {title:<40} under way" + (f", {done} shards whole" if done else ""))
            elif (folder / stages.MANIFEST).exists():
                ref = read_json(folder / stages.MANIFEST)["ref"]
                lines.append(f"  {title:<40} whole, {ref['rows']} rows, {ref['seconds']:.1f} s")
    return lines
