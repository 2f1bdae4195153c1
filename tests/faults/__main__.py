"""``python -m tests.faults [NAME …]``: bring faults about, print what came of them and store it in reports/faults/."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.bench.__main__ import main

NAMES = ("kill", "damage", "files", "soak", "inputs")

if __name__ == "__main__":
    main(sys.argv[1:], package="tests.faults", names=NAMES, out=Path("reports/faults"))
