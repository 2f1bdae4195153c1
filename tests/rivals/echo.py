"""A stand-in for a library: what ``test_child`` lets run in a process of its own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from tasks.common.errors import InputError
from tasks.common.usage import searching
from tasks.scoring.rivals.child import serve, tell


def work(given: dict[str, Any]) -> None:
    print("a library's own words")
    for _ in range(4):
        tell(2)
    match given["then"]:
        case "refuse":
            raise InputError("is not right", file="pool.parquet", row=3, field="text")
        case "fail":
            raise ZeroDivisionError("the library's own fault")
        case "grow":
            with searching():
                time.sleep(0.3)
            np.ones(given["mib"] << 17)
        case "wait":
            Path(given["pid"]).write_text(str(os.getpid()))
            time.sleep(120)


if __name__ == "__main__":
    serve(work)
