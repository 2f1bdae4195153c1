"""TrackStar's whole pipeline over RISE's, on the same documents, queries and model. Needs bergson 2.5.1 (not installed
by this project; it must not bring its own torch or torchvision)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flows.config import load
from tasks.common.errors import InputError
from tasks.common.models import locate
from tests.bench.engine import SMOLLM2

DOCUMENTS, QUERIES = 1_000, 40

TRACKSTAR = """
import sys
from bergson.cli.trackstar import trackstar
from bergson.config.config import DataConfig, PreprocessConfig, QuerySetConfig, TrackstarConfig, TrackstarIndexConfig

if __name__ == "__main__":
    folder, model = sys.argv[1:]
    trackstar(
        TrackstarIndexConfig(run_path=f"{folder}/trackstar", model=model, token_batch_size=1024, projection_dim=16,
                             projection_type="rademacher", loss_fn="ce", loss_reduction="mean", include_bias=False,
                             precision="fp32",
                             data=DataConfig(dataset=f"{folder}/pool.jsonl", prompt_column="text", truncation=True)),
        TrackstarConfig(query=QuerySetConfig(dataset=f"{folder}/queries.jsonl", prompt_column="text", truncation=True),
                        preprocess_cfg=PreprocessConfig(unit_normalize=True)),
    )
"""


def run() -> dict[str, Any]:
    """CPU and wall seconds of both, and their ratio; loading the model and the libraries is part of both."""
    import pyarrow.parquet as pq

    from tasks.pool.build import build_pool

    if importlib.util.find_spec("bergson") is None:
        raise InputError("this benchmark needs bergson: pip install --no-deps bergson==2.5.1 and what it imports")
    config = load(Path(__file__).parents[2] / "conf" / "closed_loop" / "demo.yaml")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_pool(config.pool, folder, seed=config.seed)
        for split, count in (("pool", DOCUMENTS), ("queries", QUERIES)):
            texts = pq.read_table(folder / f"{split}.parquet")["text"].to_pylist()[:count]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        script = folder / "run_trackstar.py"
        script.write_text(TRACKSTAR)
        model = str(locate(SMOLLM2).path)
        ours = measured([sys.executable, "-m", "flows.cli", "score", "--model", model, "--pool",
                         str(folder / "pool.jsonl"), "--queries", str(folder / "queries.jsonl"), "--out",
                         str(folder / "rise.parquet"), "--precision", "float32"], folder)  # fmt: skip
        theirs = measured([sys.executable, str(script), str(folder), model], folder)
    return {"documents": DOCUMENTS, "queries": QUERIES, "RISE": ours, "TrackStar": theirs,
            "CPU seconds, TrackStar over RISE": round(theirs["cpu"] / ours["cpu"], 2),
            "wall seconds, TrackStar over RISE": round(theirs["wall"] / ours["wall"], 2)}  # fmt: skip


def measured(command: list[str], folder: Path) -> dict[str, float]:
    """Wall seconds, CPU seconds of the command and its children, and the peak memory of the largest (MiB)."""
    import resource

    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with (folder / "log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, cwd=folder, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[1]} failed: {(folder / 'log').read_text()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": round(time.perf_counter() - begun, 1),
            "cpu": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
            "peak MiB": round(after.ru_maxrss / 1024)}  # fmt: skip
