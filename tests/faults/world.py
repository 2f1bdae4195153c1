"""What faults are brought upon: a small closed loop, a curation that grows and an index, over made-up text.

Every command runs in a process of its own, forked from one that has imported everything: a start costs a tenth of a
second and not five, and a fault hits the work, not the imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tasks.common.files import read_json, sha256_file, sha256_json
from tests.flow.conftest import REPOSITORY, texts
from tests.tiny import tiny_bpe, tiny_gpt_neox, tiny_olmo3

HANGS_SECONDS = 300
"""A command that takes longer counts as lost."""
_IMPORTED = ("flows.cli", "flows.closed_loop", "flows.curation", "flows.indexing", "tasks.reporting.run",
             "tasks.scoring.engine", "tasks.scoring.rise", "accelerate", "datasketch", "duckdb", "pyarrow.parquet",
             "safetensors.torch", "transformers.models.olmo3.modeling_olmo3",
             "transformers.models.gpt_neox.modeling_gpt_neox")  # fmt: skip
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([*_IMPORTED])


# Commands -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int | None
    """Exit status; minus the signal that ended it; None: it did not end in time and was killed."""
    said: list[str]
    """Lines on stderr, without the progress bars."""
    out: str
    seconds: float

    @property
    def refused(self) -> bool:
        """Whether it ended by an error of one line and nothing else."""
        return (self.status is not None and self.status > 0
                and sum(line.startswith("rise: ") for line in self.said) == 1 and self.said[-1].startswith("rise: ")
                and not any("Traceback" in line for line in self.said))  # fmt: skip

    @property
    def last(self) -> str:
        """Its last line."""
        return self.said[-1] if self.said else f"status {self.status}, nothing said"


class Command:
    """``rise ARGUMENTS``, started in a process group of its own."""

    def __init__(self, arguments: Sequence[object], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._begun = log, time.monotonic()
        self._process = _FORKS.Process(target=_command, args=([str(part) for part in arguments], str(log)), daemon=True)
        for stream in (".out", ".err"):
            log.with_suffix(stream).write_bytes(b"")  # there to be read when it is killed before it says anything
        self._process.start()

    def wait(self, seconds: float = HANGS_SECONDS) -> Done | None:
        """The command when it has ended; None if it runs on after so many seconds."""
        self._process.join(seconds)
        return None if self._process.exitcode is None else self._done()

    def kill(self) -> Done:
        """SIGKILL to the whole group."""
        pid = self._process.pid
        assert pid is not None
        with suppress(ProcessLookupError):
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                os.kill(pid, signal.SIGKILL)  # killed before it had a group
        self._process.join()
        return self._done()

    def _done(self) -> Done:
        return Done(self._process.exitcode, said(self._log.with_suffix(".err").read_text(errors="replace")),
                    self._log.with_suffix(".out").read_text(errors="replace"), time.monotonic() - self._begun)


def _command(arguments: list[str], log: str) -> None:
    os.setsid()
    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(Path(log).with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    import torch

    from flows.cli import main

    torch.set_num_threads(1)
    sys.argv = ["rise", *arguments]
    main()


def said(stderr: str) -> list[str]:
    """Lines of a command's stderr, without progress bars."""
    lines = (line.rpartition("\r")[2].strip() for line in stderr.splitlines())
    return [line for line in lines if line and not re.search(r"\d+%\|", line)]


def rise(arguments: Sequence[object], log: Path) -> Done:
    """``rise ARGUMENTS`` to its end."""
    command = Command(arguments, log)
    done = command.wait()
    if done is None:
        done = command.kill()
        return Done(None, [*done.said, f"hangs: not over after {HANGS_SECONDS} s"], done.out, done.seconds)
    return done


def alone(arguments: Sequence[object], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """``rise ARGUMENTS`` begun in a process that shares nothing with this one: its own interpreter and environment."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.with_suffix(".out").open("wb") as out, log.with_suffix(".err").open("wb") as err:
        return subprocess.Popen([sys.executable, "-m", "flows.cli", *map(str, arguments)], cwd=REPOSITORY, stdout=out,
                                stderr=err, start_new_session=True, env={**os.environ, **environment})  # fmt: skip


@contextmanager
def server(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Prefect server; ``PREFECT_API_URL`` of this process and of all commands after points to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("PREFECT_API_URL")
    os.environ |= {"PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
                   "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
                   # as `rise` does before it imports Prefect, which here is imported already
                   "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
                   "PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL": "CRITICAL"}  # fmt: skip
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None:
                raise RuntimeError((home / "server.log").read_text())
            time.sleep(0.3)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if before is not None:
            os.environ["PREFECT_API_URL"] = before


# Scenarios ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """Something that is run, in one night or in several."""

    name: str
    nights: tuple[Callable[[], None], ...]
    """What comes before each night's command."""
    command: Callable[[Path], list[object]]
    """Directory → arguments of ``rise``."""
    digests: Callable[[Path], Any]
    """Directory → all in which two equal runs are equal."""


@dataclass
class Alone:
    """A scenario that was left alone."""

    directory: Path
    digests: Any = None
    seconds: list[float] = field(default_factory=list)
    """Of each night."""


def left_alone(scenario: Scenario, directory: Path) -> Alone:
    """Run a scenario without a fault: once for what it caches of the machine, and once for its time."""
    made = Alone(directory)
    for _ in range(2):
        shutil.rmtree(directory, ignore_errors=True)
        made.seconds = []
        for night in scenario.nights:
            night()
            done = rise(scenario.command(directory), directory.with_suffix(".log"))
            if done.status != 0:
                raise RuntimeError(f"{scenario.name} fails without a fault: {done.said}")
            made.seconds.append(done.seconds)
    made.digests = scenario.digests(directory)
    return made


def models(folder: Path) -> dict[str, Path]:
    """A scorer and a trainee, tiny and random."""
    made = {"scorer": tiny_olmo3(folder / "olmo3", vocab=2000, max_position_embeddings=512),
            "trainee": tiny_gpt_neox(folder / "neox", vocab=2000, max_position_embeddings=512)}  # fmt: skip
    for model in made.values():
        tiny_bpe(model, vocab=2000)
    return made


SIGNATURE = {"kr": 16, "kh": 6, "kg": 12}


def closed_loop(folder: Path, made: Mapping[str, Path]) -> Scenario:
    """A closed loop with every stage, on local files."""
    sources = {}
    for seed, (label, count) in enumerate({"control": 50, "junk": 90}.items()):
        sources[label] = folder / f"{label}.json"
        sources[label].write_text(json.dumps([{"text": text} for text in texts(count, seed)]))
    conf = folder / "loop.yaml"
    conf.write_text(yaml.safe_dump({
        "name": "loop",
        "pool": {"size": 60, "queries": 4, "heldout": {"control": 6, "junk": 6},
                 "sources": {label: {"label": label, "path": str(path)} for label, path in sources.items()}},
        "scorer": {"model": str(made["scorer"]), "precision": "float32", "batch_tokens": 256, "shard_tokens": 512,
                   "threads": 1},
        "arms": {"perplexity": {"method": "perplexity"},
                 "bits": {"method": "rise", "sketch": SIGNATURE, "calibration": "median-bit+spread",
                          "index_type": "bit"}},
        "base": False, "oracle": False,
        "selection": {"resamples": 20},
        "pretraining": {"model": str(made["trainee"]), "precision": "float32", "epochs": 4, "batch_size": 2,
                        "max_length": 64, "checkpoint_every": 2},
        "evaluation": {"precision": "float32", "resamples": 20, "arc": None, "ruler_cwe": None},
    }))  # fmt: skip

    def digests(directory: Path) -> Any:
        manifest = read_json(directory / "manifest.json")
        return [manifest["digest"], manifest["ledger"], tree(directory, ("model.safetensors", "scores.parquet"))]

    return Scenario("closed loop", (lambda: None,), lambda out: ["run", conf, "--out", out], digests)


def curation(folder: Path, made: Mapping[str, Path], *, nights: int = 3) -> Scenario:
    """A curation of a folder that gets a file before each night; the directory of all its runs is the same."""
    inbox = folder / "inbox"
    conf = curation_conf(folder, made, inbox)

    def night(number: int) -> Callable[[], None]:
        def come() -> None:
            if number == 0:
                shutil.rmtree(inbox, ignore_errors=True)
            arrive(inbox, number, documents=24)

        return come

    def digests(directory: Path) -> Any:
        from tasks.selection.curation_ledger import LEDGER, curation_digest

        entries = [read_json(path)["entry"]["digest"] for path in sorted(directory.glob("runs/*/run.json"))]
        return [entries, curation_digest(directory / LEDGER), (directory / "latest").read_text(),
                tree(directory, ("selected.parquet", "card.md"))]  # fmt: skip

    return Scenario("curation", tuple(night(number) for number in range(nights)),
                    lambda out: ["curate", conf, "--out", out], digests)  # fmt: skip


def curation_conf(folder: Path, made: Mapping[str, Path], inbox: Path) -> Path:
    """The configuration of a curation of ``inbox``."""
    (folder / "queries.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(4, 999)))
    conf = folder / "curation.yaml"
    conf.write_text(yaml.safe_dump({
        "name": "cur", "intake": {"sources": {"inbox": {"folder": str(inbox)}}},
        "queries": str(folder / "queries.jsonl"), "budget": {"documents": 12}, "positive": "control",
        "scorer": {"model": str(made["scorer"]), "precision": "float32", "batch_tokens": 256, "shard_tokens": 400,
                   "threads": 1},
        "signature": {"sketch": SIGNATURE, "fit": {"name": "median-bit+spread", "documents": 16}, "enough": 40},
    }))  # fmt: skip
    return conf


def arrive(inbox: Path, number: int, *, documents: int) -> None:
    """A new file of documents in the inbox."""
    inbox.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "label": ("control", "junk")[place % 2]}
            for place, text in enumerate(texts(documents, 1000 + number))]  # fmt: skip
    part = inbox / f".{number:04d}"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.rename(inbox / f"{number:04d}.jsonl")


def tree(directory: Path, names: Sequence[str] = ()) -> str:
    """SHA-256 over the files of a directory, or over those with some names."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and (not names or path.name in names))
    return sha256_json([[path.relative_to(directory).as_posix(), sha256_file(path)] for path in files])


def litter(directory: Path, left: Path) -> list[str]:
    """What a run that was left alone did not leave: unfinished stages, parts of files."""
    return sorted(_names(directory) - _names(left))


def _names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


def whole(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file that is whole for good (of whole stages, whole shards, whole parts of an evaluation) → its inode and
    its time of change. Who makes one of them again, by the same bytes or not, changes these."""
    files: set[Path] = set()
    for key in directory.rglob("work.json"):
        if (key.parent / "manifest.json").exists():
            files |= {path for path in key.parent.rglob("*") if path.is_file()}
    for entry in directory.rglob("shards/*.json"):
        places = entry.relative_to(directory).parts
        if not {"sample", "queries"} & {*places} and not any(place.endswith(".half") for place in places):
            files |= {path for path in entry.parent.glob(f"{entry.stem}.*") if path.suffix in (".npy", ".parquet")}
    for part in ("perplexity", "arc", "cwe"):
        files |= {*directory.glob(f"evaluation/*.partial/{part}.parquet")}
    found = {}
    for path in files:
        with suppress(FileNotFoundError):
            stat = path.stat()
            found[path.relative_to(directory).as_posix().replace(".partial/", "/")] = stat.st_ino, stat.st_mtime_ns
    return found


def again(before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]) -> list[str]:
    """Files that were whole and have been made again, or are gone; an index of floats goes when its own is whole."""
    kept = {place for name in after for place in Path(name).parents}
    return sorted(name for name, stat in before.items() if after.get(name) != stat
                  and not (name not in after and _own_index(name) in kept))


def _own_index(name: str) -> Path | None:
    """The index that takes the place of the one of floats in which a file lies."""
    early = next((place for place in Path(name).parents if place.suffix == ".early"), None)
    return early and early.with_suffix("")
