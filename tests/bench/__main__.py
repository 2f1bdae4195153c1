"""``python -m tests.bench [NAME …]``: run benchmarks, print their figures and store them in reports/bench/."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from flows.rundir import surroundings
from tasks.common.files import write_json

NAMES = ("engine", "growth", "search", "types", "precision", "trackstar")


def main(arguments: list[str]) -> None:
    """Run the named benchmarks, or all of them."""
    parser = argparse.ArgumentParser(prog="rise bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=Path("reports/bench"), help="directory of the stored figures")
    given = parser.parse_args(arguments)
    for name in given.names:
        if name not in NAMES:
            parser.error(f"no benchmark {name!r}; there are {', '.join(NAMES)}")
    for name in given.names or NAMES:
        figures = importlib.import_module(f"tests.bench.{name}").run()
        around = surroundings(["python", "-m", "tests.bench", name])
        print(json.dumps({name: figures}, indent=2, ensure_ascii=False))
        write_json(given.out / f"{name}.json", {"figures": figures, **around})


if __name__ == "__main__":
    main(sys.argv[1:])
