"""``rise status``: the stages of a run, without Prefect."""

from __future__ import annotations

from pathlib import Path

import yaml

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
        return [_nights(run)[0] if _curates(run) else
                f"{run}: {'whole' if (run / MANIFEST).exists() else 'not finished'}" for run in runs]  # fmt: skip
    if not (directory / CONFIG).exists():
        raise InputError("holds no run", file=directory)
    if _curates(directory):
        return _nights(directory)
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


def _curates(directory: Path) -> bool:
    """Whether a run's directory is that of a curation."""
    return yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8")).get("kind") == "curation"


def _nights(directory: Path) -> list[str]:
    """A curation, then one line a run of it."""
    over = [read_json(file)["entry"] for file in sorted((directory / "runs").glob("*/run.json"))]
    latest = directory / "latest"
    standing = latest.read_text(encoding="utf-8").strip() if latest.exists() else "nothing published"
    lines = [f"{directory}: curation, {len(over)} runs, {over[-1]['documents'] if over else 0} documents, {standing}"]
    for entry in over:
        lines.append(f"  run {entry['run']:04d}, {entry['finished']} UTC  {entry['new_documents']} new, "
                     f"{entry['duplicates']} repeats, {entry['skipped']} bad rows, {entry['scored_tokens']} tokens "
                     f"scored, {entry['selected']} selected, {'published' if entry['published'] else 'as it was'}")
    for folder in sorted(file.parent for file in (directory / "runs").glob("*/begun.json")):
        if not (folder / "run.json").exists():
            stood = [name for name in ("intake", "result") if (folder / name / stages.MANIFEST).exists()]
            lines.append(f"  run {folder.name}  under way, whole: {', '.join(stood) or 'nothing yet'}")
    for index in sorted(file.with_suffix("") for file in (directory / "indexes").glob("*.json")):
        shards = len(list((index / "shards").glob("*.json")))
        at_work = not (index / MANIFEST).exists() or (index / "append.json").exists()
        lines.append(f"  index {index.name}  {shards} shards whole{', under way' if at_work else ''}")
    return lines
