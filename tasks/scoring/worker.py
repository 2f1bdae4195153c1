"""One of several scoring processes, started by torchrun: ``python -m tasks.scoring.worker WORK.json``."""

from __future__ import annotations

import sys
from pathlib import Path

from tasks.scoring.share import work

if __name__ == "__main__":
    work(Path(sys.argv[1]))
