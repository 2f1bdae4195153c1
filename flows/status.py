"""``rise status``: the stages of a run, without Prefect."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from flows.rundir import CONFIG, MANIFEST
from tasks.common import stage as stages
from tasks.common.config import read_yaml
from tasks.common.errors import InputError
from tasks.common.files import read_json
from tasks.common.progress import time_left

_RECENT = 20
"""Shards that a rate is taken of."""
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
                lines.append(f"  {title:<40} under way" + _done(folder, _pool_rows(directory)))
            elif (folder / stages.MANIFEST).exists():
                ref = read_json(folder / stages.MANIFEST)["ref"]
                rate = f", {ref['rows'] / ref['seconds']:,.1f} a second" if ref["seconds"] >= 1 else ""
                lines.append(f"  {title:<40} whole, {ref['rows']} rows, {ref['seconds']:.1f} s{rate}")
    return lines


def _pool_rows(directory: Path) -> int | None:
    """Documents that a closed loop scores, queries included; None where its pool is not whole, and of a study."""
    import pyarrow.parquet as pq

    files = [directory / "pool" / f"{name}.parquet" for name in ("pool", "queries")]
    return sum(pq.ParquetFile(file).metadata.num_rows for file in files) if all(map(Path.exists, files)) else None


def _done(folder: Path, wanted: int | None, first: int = 0) -> str:
    """Shards below a folder that are whole from number ``first`` on, documents in all, how fast, how long still.

    Of indexes that are made by one forward pass the one that is furthest behind counts.
    """
    indexes = {file.parents[1] for file in folder.glob("**/shards/*.json")} - {*folder.glob("**/sample")}
    indexes |= {sample.parent for sample in folder.glob("**/sample")}
    least: list[tuple[float, int, dict[str, Any]]] | None = None
    for index in indexes:
        shards = {file.name: file for part in (index, index / "sample") for file in (part / "shards").glob("*.json")}
        found = sorted((file.stat().st_mtime, int(file.stem), read_json(file)) for file in shards.values())
        least = found if least is None or len(found) < len(least) else least
    if not least:
        return ""
    documents = sum(entry["documents"] for _, _, entry in least)
    new = [(when, entry["tokens"]) for when, number, entry in least if number >= first]
    line = f", {len(new)} shards whole, {documents:,}{'' if wanted is None else f' of {wanted:,}'} documents"
    recent = new[-_RECENT:]
    if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
        return line
    rate = sum(tokens for _, tokens in recent[1:]) / (recent[-1][0] - recent[0][0])
    line += f", {rate:,.0f} tokens a second"
    if wanted is None or wanted <= documents:
        return line
    mean = sum(entry["tokens"] for _, _, entry in least) / documents
    return f"{line}, about {time_left((wanted - documents) * mean / rate)} left"


def _curates(directory: Path) -> bool:
    """Whether a run's directory is that of a curation."""
    return read_yaml(directory / CONFIG).get("kind") == "curation"


def _nights(directory: Path) -> list[str]:
    """A curation, then one line a run of it."""
    over = [read_json(file)["entry"] for file in sorted((directory / "runs").glob("*/run.json"))]
    latest = directory / "latest"
    standing = latest.read_text(encoding="utf-8").strip() if latest.exists() else "nothing published"
    lines = [f"{directory}: curation, {len(over)} runs, {over[-1]['documents'] if over else 0} documents, {standing}"]
    for entry in over:
        took = datetime.fromisoformat(entry["finished"]) - datetime.fromisoformat(entry["started"])
        lines.append(f"  run {entry['run']:04d}, {entry['finished']} UTC, {time_left(took.total_seconds())}  "
                     f"{entry['new_documents']} new, "
                     f"{entry['duplicates']} repeats, {entry['skipped']} bad rows, {entry['scored_tokens']} tokens "
                     f"scored, {entry['selected']} selected, {'published' if entry['published'] else 'as it was'}")
    for folder in sorted(file.parent for file in (directory / "runs").glob("*/begun.json")):
        if not (folder / "run.json").exists():
            stood = [name for name in ("intake", "result") if (folder / name / stages.MANIFEST).exists()]
            lines.append(f"  run {folder.name}  under way, whole: {', '.join(stood) or 'nothing yet'}")
    for begun in sorted((directory / "indexes").glob("*.json")):
        index = begun.with_suffix("")
        early = index.with_name(f"{index.name}.early")
        index = early if early.exists() else index
        adding = index / "append.json"
        if adding.exists() or not (index / MANIFEST).exists():
            intakes = [file.parent for file in (directory / "runs").glob(f"*/intake/{stages.MANIFEST}")]
            wanted = sum(read_json(intake / stages.MANIFEST)["ref"]["rows"] for intake in intakes)
            first = read_json(adding)["first"] if adding.exists() else 0
            lines.append(f"  index {index.name}  under way{_done(index, wanted, first)}")
        else:
            held = read_json(index / MANIFEST)["batches"]
            lines.append(f"  index {index.name}  whole, {sum(batch['documents'] for batch in held):,} documents")
    return lines
