"""``rise score``: files in, a ranking out, without the rest of the loop."""

from __future__ import annotations

import glob
import shutil
import sys
from pathlib import Path
from typing import Any

from flows.indexing import require_channel
from tasks.common.config import apply_setting, parse
from tasks.common.errors import InputError, one_line
from tasks.common.files import check_output, nothing_left, sha256_file, sha256_json
from tasks.common.models import locate
from tasks.pool.documents import read_documents, write_documents
from tasks.scoring.config import METHODS, MethodConfig, RiseConfig, ScorerConfig

WITHOUT_QUERIES = {"random", "length", "perplexity"}
WITHOUT_MODEL = {"random", "bm25", "embedding"}


def score_files(
    *, model: str | None, pool: Path, queries: Path | None, out: Path, per_query: Path | None, method: str,
    calibration: str, alpha: float, kr: int, kh: int, kg: int, km: int, lambda_rh: float, lambda_gh: float,
    max_length: int, seed: int, dtype: str, precision: str, on_bad_row: Any, settings: tuple[str, ...] = (),
) -> str:  # fmt: skip
    """Score the documents of ``pool`` and write ``out``; what a killed call finished is used by the next.

    Returns:
        One line that says what was done.

    Raises:
        InputError: a file, the model or an option cannot be used.
    """
    from tasks.scoring.methods import Request, score_pool, write_scores

    if model is None and method not in WITHOUT_MODEL:
        raise InputError(f"--model is needed by --method {method}")
    if queries is None and method not in WITHOUT_QUERIES:
        raise InputError(f"--queries is needed by --method {method}")
    if per_query is not None and method in WITHOUT_QUERIES:
        raise InputError(f"--per-query: the method {method} looks at no query")
    sketch = {"kr": kr, "kh": kh, "kg": kg, "km": km, "lambda_rh": lambda_rh, "lambda_gh": lambda_gh, "alpha": alpha,
              "seed": seed}  # fmt: skip
    known = {"sketch": sketch, "calibration": calibration, "index_type": dtype, "seed": seed}
    given: dict[str, Any] = {name: value for name, value in known.items() if name in METHODS[method].model_fields}
    for setting in settings:
        try:
            apply_setting(given, setting)
        except InputError as error:
            raise InputError(error.problem.replace("--set", "--option", 1)) from None
    if "recipe" in given:  # the options have all fields, so that it would stand for none
        raise InputError("--option recipe=NAME: a recipe is given by --recipe NAME")
    config: MethodConfig = parse(METHODS[method], given, "options")
    if isinstance(config, RiseConfig):
        require_channel(config.sketch)
    scorer = parse(ScorerConfig, {"model": model or "none", "max_length": max_length, "precision": precision},
                   "options")  # fmt: skip
    check_output(out, pool, queries)
    if per_query is not None:
        check_output(per_query, pool, queries, out)
    documents = read_documents(pool, on_bad_row=on_bad_row)
    wanted = None if queries is None else read_documents(queries, on_bad_row=on_bad_row, prompts=True)
    key = sha256_json([config.plain(), scorer.plain(), sha256_file(pool), sha256_file(queries) if queries else None,
                       locate(model).digest if model else None, on_bad_row])  # fmt: skip
    work = out.parent / f".{out.name}.{key[:16]}.work"
    for old in out.parent.glob(f".{glob.escape(out.name)}.*.work"):
        if old != work:
            shutil.rmtree(old)
    with nothing_left(work):
        work.mkdir(parents=True, exist_ok=True)
        write_documents(work / "pool.parquet", documents.table)
        if wanted is not None:
            write_documents(work / "queries.parquet", wanted.table)
        scores = score_pool(config, Request(work / "pool.parquet", work / "queries.parquet", scorer, work))
    write_scores(scores, out, per_query=per_query)
    shutil.rmtree(work)
    skipped = [*documents.skipped, *(wanted.skipped if wanted else [])]
    for row in skipped:
        print(one_line(f"skipped: {row.file}, row {row.row}, field {row.field}: {row.problem}"), file=sys.stderr)
    note = f"; {len(skipped)} bad rows skipped" if skipped else ""
    return f"{len(scores.doc_ids)} documents scored by {method} into {out}{note}"
