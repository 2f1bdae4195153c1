"""One of several scoring processes, started by torchrun: ``python -m tasks.scoring.worker SPEC.json``."""

from __future__ import annotations

import sys
from pathlib import Path

from tasks.common.files import read_json
from tasks.scoring.build import build_index
from tasks.scoring.config import ScorerConfig, SketchConfig

if __name__ == "__main__":
    spec = read_json(Path(sys.argv[1]))
    build_index(
        Path(spec["documents"]), Path(spec["out"]), ScorerConfig(**spec["scorer"]),
        SketchConfig(**spec["sketch"]) if spec["sketch"] else None,
        stored=spec["stored"], losses=spec["losses"], label=spec["label"],
    )  # fmt: skip
