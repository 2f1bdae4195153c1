"""``rise index …``: signatures on disk."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.common.config import apply_setting, parse
from tasks.common.elsewhere import at_hand
from tasks.common.errors import InputError, one_line
from tasks.common.files import LOCK, locked, nothing_left, remove_parts, sha256_file
from tasks.pool.documents import read_documents, write_documents
from tasks.scoring.config import FitConfig, RayConfig, ScorerConfig, SketchConfig, check_type


def build(
    *, model: str, data: Path | str, out: Path, dtype: Any, calibration: str | None, fit_documents: int, kr: int,
    kh: int, kg: int, km: int, lambda_rh: float, lambda_gh: float, alpha: float, seed: int, max_length: int,
    precision: str, shard_tokens: int, processes: int, runner: str, ray: Sequence[str], on_bad_row: Any,
) -> str:  # fmt: skip
    """Build the index of a file of documents, or go on with it.

    Returns:
        One line that says what was done.

    Raises:
        InputError: a file, the model or an option cannot be used, or ``out`` holds something else.
    """
    from tasks.scoring.build import build_index
    from tasks.scoring.index import PLAN

    sketch = parse(SketchConfig, {"kr": kr, "kh": kh, "kg": kg, "km": km, "lambda_rh": lambda_rh,
                                  "lambda_gh": lambda_gh, "alpha": alpha, "seed": seed}, "options")  # fmt: skip
    require_channel(sketch)
    scorer = parse(ScorerConfig, {"model": model, "max_length": max_length, "precision": precision,
                                  "shard_tokens": shard_tokens, "processes": processes,
                                  "ray": _ray(runner, ray)}, "options")  # fmt: skip
    name = calibration or ("median-bit" if dtype == "bit" else "none")
    fit = None if name == "none" else parse(FitConfig, {"name": name, "documents": fit_documents}, "options")
    try:
        check_type(dtype, name)
    except ValueError as error:
        raise InputError(f"--dtype {dtype} with --calibration {name}: {error}") from None
    _require_index(out, PLAN)
    with (
        at_hand(data) as file, _as_parquet(file, on_bad_row, _shared(scorer, out)) as documents, _held(out),
        nothing_left(out),
    ):  # fmt: skip
        count = build_index(documents, out, scorer, sketch, stored=dtype, fit=fit, data=sha256_file(file),
                            label="index")  # fmt: skip
    return f"{count} documents in the index {out}"


def require_channel(sketch: SketchConfig) -> None:
    """Refuse options that leave no channel of a signature."""
    if sketch.silent:
        raise InputError("no channel is left: --lambda-rh is 0, --lambda-gh or --kg is 0, and --km is 0")


def convert(*, directory: Path, out: Path, dtype: Any, calibration: str | None, fit_documents: int) -> str:
    """Make an index of another type from one that stands, or go on with it.

    Returns:
        One line that says what was done.

    Raises:
        InputError: the index holds bits, an option cannot be used, or ``out`` holds something else.
    """
    from tasks.scoring.convert import convert_index
    from tasks.scoring.index import PLAN, Index

    name = calibration or ("median-bit" if dtype == "bit" else "none")
    fit = None if name == "none" else parse(FitConfig, {"name": name, "documents": fit_documents}, "options")
    _require_index(out, PLAN)
    with _held(out), nothing_left(out):
        count = convert_index(Index(directory), out, stored=dtype, fit=fit)
    return f"{count} documents in the index {out}"


def append(
    *, directory: Path, data: Path | str, model: str | None, processes: int, runner: str, ray: Sequence[str],
    on_bad_row: Any,
) -> str:  # fmt: skip
    """Add a file of documents to an index, or go on with that.

    Returns:
        One line that says what was done.

    Raises:
        InputError: a file or the model cannot be used, or a document is in the index already.
    """
    from tasks.scoring.build import append_index, scorer_of
    from tasks.scoring.index import Index

    scorer = scorer_of(Index(directory), model=model, processes=processes, ray=_ray(runner, ray))
    with (
        at_hand(data) as file, _as_parquet(file, on_bad_row, _shared(scorer, directory)) as documents,
        _held(directory),
    ):  # fmt: skip
        count = append_index(documents, directory, scorer, data=sha256_file(file), label="index")
    return f"{count} documents added; {len(Index(directory))} in the index {directory}"


def info(directory: Path) -> list[str]:
    """What an index is made of, in lines."""
    from tasks.scoring.build import APPEND
    from tasks.scoring.index import Index
    from tasks.scoring.store import bytes_a_document

    whole = Index(directory)
    manifest = whole.manifest
    sketch = SketchConfig(**manifest["sketch"]) if manifest["sketch"] else None
    scorer = manifest["scorer"]
    lines = {"documents": f"{len(whole):,} in {len(whole.shards):,} shards; "
                          f"{sum(shard['tokens'] for shard in manifest['shards']):,} tokens"}  # fmt: skip
    if sketch:
        size = bytes_a_document(whole.stored, whole.dimension)
        lines["signatures"] = f"{whole.stored}, {size:,} bytes a document, {size * len(whole) / 1e6:,.1f} MB"
        lines["sketch"] = (f"{sketch.shape}, D = {sketch.dimension:,}; λ_rh {sketch.lambda_rh:g}, "
                           f"λ_gh {sketch.lambda_gh:g}, α {sketch.alpha:g}, seed {sketch.seed}")  # fmt: skip
    fit = manifest.get("calibration")
    lines["calibration"] = whole.calibration_name
    if fit and whole.stored == "bit":
        lines["calibration"] += f", fitted on a sample of up to {fit['documents']:,} documents (seed {fit['seed']})"
    revision = f" at {scorer['revision']}" if scorer["revision"] else ""
    lines["model"] = f"{scorer['model']}{revision} (digest {manifest['model'][:16]}…)"
    lines["read"] = f"up to {manifest['max_length']} tokens, {manifest['precision']}"
    for number, batch in enumerate(manifest["batches"]):
        lines["build" if number == 0 else f"append {number}"] = (
            f"{batch['documents']:,} documents in {batch['shards']:,} shards; data {batch['data'][:16]}…")
    lines["format"] = str(manifest["format"])
    if (directory / APPEND).exists():
        lines["under way"] = "an append; the same command goes on with it"
    return [f"{name:<12} {line}" for name, line in lines.items()]


def verify(directory: Path) -> str:
    """Recompute every checksum of an index.

    Returns:
        One line that says how much is whole.

    Raises:
        InputError: naming the first file that is missing or has changed.
    """
    from tasks.scoring import index

    shards, documents = index.verify(directory)
    return f"{shards} shards, {documents} documents whole"


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold an index for a writer; what a killed one was writing is removed."""
    with locked(directory):
        remove_parts(directory)
        yield


def _require_index(out: Path, plan: str) -> None:
    """Refuse a place that is neither empty nor an index; a build that was killed as it began left only the hidden."""
    if out.exists() and not (out / plan).exists() and (not out.is_dir() or any(
            path.name != LOCK and not path.name.startswith(f".{plan}.") for path in out.iterdir())):
        raise InputError("is neither empty nor an index; choose another --out", file=out)


def _ray(runner: str, settings: Sequence[str]) -> RayConfig | None:
    """What ``--runner`` and ``--ray FIELD=VALUE`` say."""
    if runner != "ray":
        if settings:
            raise InputError(f"--ray goes with --runner ray, not with --runner {runner}")
        return None
    given: dict[str, Any] = {}
    for setting in settings:
        try:
            apply_setting(given, setting)
        except InputError as error:
            raise InputError(error.problem.replace("--set", "--ray", 1)) from None
    return parse(RayConfig, given, "--ray")


def _shared(scorer: ScorerConfig, out: Path) -> Path | None:
    """Where a file has to stand that all workers read: beside the index, where some are on other machines."""
    return out.absolute().parent if scorer.ray is not None and scorer.ray.address is not None else None


@contextmanager
def _as_parquet(data: Path, on_bad_row: Any, place: Path | None) -> Iterator[Path]:
    """The documents of a file as the stages read them, for as long as they are needed."""
    read = read_documents(data, on_bad_row=on_bad_row)
    for row in read.skipped:
        print(one_line(f"skipped: {row.file}, row {row.row}, field {row.field}: {row.problem}"), file=sys.stderr)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rise-", dir=place) as folder:
        documents = Path(folder) / "documents.parquet"
        write_documents(documents, read.table)
        del read
        yield documents
