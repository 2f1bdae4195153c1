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


def main(
    arguments: list[str], *, package: str = "tests.bench", names: tuple[str, ...] = NAMES,
    out: Path = Path("reports/bench"),
) -> None:  # fmt: skip
    """Run the named modules of a package, or all of them, and store the figures that their ``run()`` returns."""
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description="Measure, print and store figures.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=out, help="directory of the stored figures")
    given = parser.parse_args(arguments)
    for name in given.names:
        if name not in names:
            parser.exit(2, f"rise: there is no {name!r}; there are {', '.join(names)}\n")
    for name in given.names or names:
        figures = importlib.import_module(f"{package}.{name}").run()
        around = surroundings(["python", "-m", package, name])
        print(json.dumps({name: figures}, indent=2, ensure_ascii=False))
        write_json(given.out / f"{name}.json", {"figures": figures, **around})


if __name__ == "__main__":
    main(sys.argv[1:])
