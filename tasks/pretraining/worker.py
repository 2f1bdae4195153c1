"""One process of a training that :mod:`tasks.pretraining.launch` started under torchrun."""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path

from tasks.common.errors import InputError
from tasks.common.files import read_json, write_json
from tasks.pretraining.config import PretrainingConfig
from tasks.pretraining.launch import SHARE
from tasks.pretraining.train import prepare, train_here


def main() -> None:
    """Train as the file named by ``--spec`` says; what fails in the main process is written where it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, required=True)
    spec = read_json(parser.parse_args().spec)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        run = prepare(PretrainingConfig.model_validate(spec["config"]), Path(spec["documents"]))
        train_here(run, Path(spec["out"]), report=lambda share: print(SHARE, share, flush=True))
    except (InputError, RuntimeError) as error:
        if os.environ["RANK"] == "0":
            write_json(Path(spec["failure"]), _describe(error))
        raise SystemExit(1) from None


def _describe(error: InputError | RuntimeError) -> dict[str, str | int | None]:
    if isinstance(error, InputError):
        place: dict[str, str | int | None] = {"file": error.file, "row": error.row, "field": error.field}
        return {"kind": "input", "problem": error.problem, **place}
    return {"kind": "runtime", "problem": str(error)}


def _end_with_the_parent() -> None:
    """Standard input is a pipe that nobody writes to: it ends when the process that started the training is gone."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
