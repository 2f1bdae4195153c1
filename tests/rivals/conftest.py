"""Rivals that come from libraries, on tiny models: ``pytest -m rivals``, skipped where the extra is not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.scoring.config import ScorerConfig
from tasks.scoring.methods import Request
from tests.tiny import tiny_gpt_neox

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "seven", "wizards", "box"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTNeoX with an untied head; its linear layers have biases."""
    return tiny_gpt_neox(tmp_path_factory.mktemp("neox"))


def texts(count: int, seed: int) -> dict[str, str]:
    """Documents of 1 to 8 words, the last of a single token."""
    rng = np.random.default_rng(seed)
    made = {f"doc{seed}{i:02d}": " ".join(rng.choice(WORDS, rng.integers(1, 9))) for i in range(count - 1)}
    return {**made, f"doc{seed}{count:02d}": "x"}


def write(path: Path, documents: dict[str, str]) -> Path:
    """Documents as a stage's Parquet, in the order given."""
    pq.write_table(pa.table({"doc_id": list(documents), "text": list(documents.values())}), path)
    return path


@pytest.fixture
def asked(tmp_path: Path, model: Path) -> Request:
    """24 documents and 5 queries."""
    scorer = ScorerConfig(model=str(model), precision="float32", max_length=200, threads=1)
    return Request(write(tmp_path / "pool.parquet", texts(24, 1)), write(tmp_path / "queries.parquet", texts(5, 2)),
                   scorer, tmp_path / "work")  # fmt: skip


def turned(asked: Request, folder: Path) -> Request:
    """The same request, its files in reverse order."""
    folder.mkdir()
    files = []
    for file in (asked.pool, asked.queries):
        rows = pq.read_table(file).to_pylist()[::-1]
        files.append(write(folder / file.name, {row["doc_id"]: row["text"] for row in rows}))
    return Request(*files, asked.scorer, folder / "work")
