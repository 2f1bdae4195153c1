"""Bad inputs: each is bad by construction, and must end in one line that names it, with nothing made or changed.

A case is a command line, the files it reads and what its line must name. Hypothesis draws cases of every kind from a
fixed seed; they run in this process through the command line's own entry point. Odd cases are unusual but no mistakes
(a byte order mark, paths for ids, emoji): they must come out whole or be refused as cleanly.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_llama

HERE, OUT = "{here}", "{here}/out/scores.parquet"
"""Stands for the world's directory in a command line or a file; a file to write in it."""
CASE = f"{HERE}/case"
"""Where a case's own files stand."""
TOO_LONG_SECONDS = 120
SKETCH = ["--kr", "8", "--kh", "4", "--kg", "8", "--precision", "float32"]
WORDS = ("amber", "birch", "cloud", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "knoll", "larch")


@dataclass(frozen=True)
class Case:
    """A command line, what it reads, and what its one line has to name."""

    arguments: tuple[str, ...]
    files: Mapping[str, bytes | Path | None] = field(default_factory=dict)
    """Name below :data:`CASE` → content; None is a directory, a path is where a link leads."""
    names: tuple[str, ...] = ()
    """Parts of the line: the file, ``row 3``, ``field text``."""
    odd: bool = False
    """Unusual but no mistake: it may succeed."""


@dataclass(frozen=True)
class Ended:
    """What came of a case."""

    status: int
    lines: list[str]
    """On stderr, without progress bars."""
    changed: list[str]
    """Files that appeared, vanished or changed."""
    out: str = ""
    """What stood on stdout."""

    def wrong(self, case: Case) -> str | None:
        """What is wrong with it, or None."""
        text = "\n".join(self.lines)
        if "Traceback" in text:
            return "traceback"
        if self.status == 0:
            if not case.odd:
                return "taken"
            made = [path for path in self.changed if path != "out" and not path.startswith("out/scores.parquet")]
            return f"left {made}" if made else None
        if self.changed:
            return "partial"
        if not self.lines:
            return "silent"
        if len(self.lines) != 1 or not self.lines[0].startswith("rise: "):
            return "not one line"
        if self.status != 2:
            return f"exit {self.status}"
        if not self.lines[0].isprintable():
            return "steers the terminal"
        missing = [name for name in case.names if name not in self.lines[0]]
        return f"does not name {missing}" if missing else None


# The world ------------------------------------------------------------------------------------------------------------


class World:
    """A directory with a tiny model, a pool, queries, an index, configurations and a run that is claimed."""

    port = 0
    """A port on which something listens."""

    def __init__(self, here: Path) -> None:
        self.here = here
        tiny_llama(here / "model")
        (here / "out").mkdir()
        _jsonl(here / "pool.jsonl", [{"id": f"d{n}", "text": f"{word} {WORDS[n - 1]} by the water"}
                                     for n, word in enumerate(WORDS)])  # fmt: skip
        _jsonl(here / "long.jsonl", [{"text": "more than the model has positions " * 20}])
        _jsonl(here / "queries.jsonl", [{"id": "q", "text": "amber cloud by the river"}])
        for label in ("control", "junk"):
            _jsonl(here / f"{label}.jsonl", [{"text": f"{label} {word} text"} for word in WORDS])
        (here / "inbox").mkdir()
        shutil.copy(here / "pool.jsonl", here / "inbox" / "pool.jsonl")
        configurations = _configurations(here)
        (here / "pool.yaml").write_text(yaml.safe_dump(configurations["run"]["pool"]))
        for name, values in configurations.items():
            (here / f"{name}.yaml").write_text(yaml.safe_dump(values))
        # What is refused here after all would otherwise be begun: this run was made of something else.
        (here / "claimed").mkdir()
        (here / "claimed" / "config.yaml").write_text("made: of something else\n")
        (here / "file").write_text("a file\n")
        built = self.run(Case(("index", "build", "--model", f"{HERE}/model", "--data", f"{HERE}/pool.jsonl", "--out",
                               f"{HERE}/index", *SKETCH)))  # fmt: skip
        if built.status:
            raise RuntimeError(f"no index could be built: {built.lines}")

    def run(self, case: Case) -> Ended:
        """Bring a case about."""
        folder = self.here / "case"
        folder.mkdir()
        for name, content in case.files.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                place.mkdir()
            elif isinstance(content, bytes):
                place.write_bytes(self._at_home(content.decode("latin-1")).encode("latin-1"))
            else:
                place.symlink_to(content)
        before = self._seen()
        try:
            status, said, out = rise([self._at_home(argument) for argument in case.arguments], self.here)
            after = self._seen()
        finally:
            shutil.rmtree(folder)
        lines = [line.rpartition("\r")[2].strip() for line in said.split("\n")]
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        return Ended(status, [line for line in lines if line], changed, out)

    def tidy(self) -> None:
        """Remove what a case has made."""
        shutil.rmtree(self.here / "out")
        (self.here / "out").mkdir()

    def _at_home(self, text: str) -> str:
        return text.replace(HERE, str(self.here))

    def _seen(self) -> dict[str, tuple[int, int]]:
        stats = {path: path.lstat() for path in self.here.rglob("*")}
        return {path.relative_to(self.here).as_posix(): (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
                for path, stat in stats.items()}  # fmt: skip


def rise(arguments: list[str], here: Path) -> tuple[int, str, str]:
    """``rise ARGUMENTS`` in this process: its exit status, what it and its libraries wrote to stderr, and stdout."""
    from flows.cli import main

    def too_long(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"no end after {TOO_LONG_SECONDS} s")

    kept, argv, where = [os.dup(1), os.dup(2)], sys.argv, Path.cwd()
    alarm = signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        texts = [io.TextIOWrapper(file, errors="backslashreplace", write_through=True) for file in (out, err)]
        try:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            os.chdir(here)
            sys.argv = ["rise", *arguments]
            signal.alarm(TOO_LONG_SECONDS)
            with contextlib.redirect_stdout(texts[0]), contextlib.redirect_stderr(texts[1]):
                main()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, alarm)
            sys.argv = argv
            os.chdir(where)
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)
        err.seek(0), out.seek(0)
        said, printed = (file.read().decode(errors="replace") for file in (err, out))
        for text in texts:
            text.detach()
    return status, said, printed


def _jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _configurations(here: Path) -> dict[str, dict[str, Any]]:
    """A closed loop, a study and a curation that are in order."""
    scorer = {"model": str(here / "model"), "precision": "float32", "batch_tokens": 256, "max_length": 32}
    pool = {"size": 12, "control_share": 0.25, "queries": 2, "heldout": {"control": 1, "junk": 1},
            "sources": {name: {"label": name, "path": str(here / f"{name}.jsonl")} for name in ("control", "junk")}}
    rise = {"method": "rise", "sketch": {"kr": 8, "kh": 4, "kg": 8, "alpha": 0.5, "seed": 1}, "calibration": "none"}
    methods = {"random": {"method": "random", "seed": 3}, "bm25": {"method": "bm25", "b": 0.5}, "rise": rise}
    return {
        "run": {"name": "small", "title": "Small", "seed": 7, "pool": pool, "scorer": scorer, "arms": methods,
                "oracle": True, "selection": {"share": 0.25, "resamples": 20, "confidence": 0.9},
                "pretraining": {"model": str(here / "model"), "epochs": 1, "batch_size": 2, "learning_rate": 0.001},
                "evaluation": {"arc": None, "ruler_cwe": None, "max_length": 32}},
        "study": {"name": "small", "seed": 7, "scorer": scorer, "methods": methods, "seeds": [1, 2], "default": "rise",
                  "paradigms": ["predict"], "rule": {"candidates": ["rise"], "max_bytes": 900},
                  "pools": {"brain": {"task": "Brain", "split": "dev", "pool": pool, "ks": [1, 2]}}},
        "curate": {"name": "small", "seed": 7, "queries": str(here / "queries.jsonl"), "scorer": scorer,
                   "intake": {"sources": {"inbox": {"folder": str(here / "inbox")}}, "near_duplicate": 0.7},
                   "signature": {"sketch": {"kr": 8, "kh": 4, "kg": 8}, "stored": "bit"},
                   "budget": {"documents": 3, "quotas": {"*": 0.5}}, "positive": "control"},
    }  # fmt: skip


# Rows -----------------------------------------------------------------------------------------------------------------

Strategy = st.SearchStrategy[Case]
_WORD = st.sampled_from(WORDS)
_TEXT = st.lists(_WORD, min_size=2, max_size=6).map(" ".join)
_ODD_TEXT = st.one_of(
    st.sampled_from([
        "naïve café 東京 🙂👩‍👩‍👧", "\u202eevil\u202c right", "zero\u200bwidth\ufeff", "a\u0000b and more",
        "\x1b[31mred\x1b[0m",
        "<script>alert(1)</script>", "a\r\nb\rc\u2028d", "ﷺ" * 50, "e\u0301" * 40, "x", "$\\frac{1}{0}$ {{ 7*7 }} %s",
    ]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(lambda text: text.strip() != ""),
    st.integers(1, 400).map(lambda n: "long " * 20 * n),
)  # fmt: skip
_ODD_ID = st.one_of(st.sampled_from(["../../x", "/etc/passwd", "a\nb", "\x1b]0;x\x07", "..", "%2e%2e", "~", "-1",
                                     "NULL",
                                     "🙂", "C:\\x", "\u202ex", "a\u0000b", "x" * 5000]),
                    st.integers(-(10**40), 10**40))  # fmt: skip
_NO_STRING = st.sampled_from([0, 1.5, True, False, [], ["a"], {}, {"a": 1}, 10**30, -0.0])


@st.composite
def _bad_values(draw: st.DrawFn) -> tuple[list[dict[str, Any]], Any, str | None]:
    """Good rows that come before, the value of a bad row, and the field that is bad."""
    before = [{"text": f"{draw(_TEXT)} {n}"} for n in range(draw(st.integers(0, 4)))]
    good = {"text": f"{draw(_TEXT)} last"}
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return before, draw(st.sampled_from([None, 1, "text", [], [1], True, 1.5, ["text", "b"]])), None
    if kind == 1:
        return before, draw(st.sampled_from([{}, {"text": None}, {"Text": "a"}, {"id": "x"}, {"body": "a"}])), "text"
    if kind == 2:
        return before, {"text": draw(_NO_STRING)}, "text"
    if kind == 3:
        return before, {"text": draw(st.text(" \t\n\r\u2003", max_size=9))}, "text"
    if kind == 4:
        name = draw(st.sampled_from(["text", "id", "label", "source"]))
        lone = draw(st.characters(categories=["Cs"]))
        return before, {**good, name: f"{draw(_TEXT)}{lone}"}, name
    if kind == 5:
        return before, {**good, "id": draw(st.sampled_from([1.5, True, [], {}, "", "  ", ["a"], "\n"]))}, "id"
    if kind == 6:
        one = draw(st.one_of(st.integers(-9, 10**20), _TEXT))
        other = draw(st.sampled_from([one, str(one)]))
        return [*before, {"text": "first of two", "id": one}], {**good, "id": other}, "id"
    if kind == 7:
        return [*before, good], dict(good), "text"
    name = draw(st.sampled_from(["label", "source"]))
    return before, {**good, name: draw(_NO_STRING)}, name


_READERS = (
    ("score", "--pool", "{file}", "--queries", f"{HERE}/queries.jsonl", "--out", OUT, "--method", "bm25"),
    ("score", "--pool", f"{HERE}/pool.jsonl", "--queries", "{file}", "--out", OUT, "--model", f"{HERE}/model", *SKETCH),
    ("index", "build", "--model", f"{HERE}/model", "--data", "{file}", "--out", f"{HERE}/out/new", *SKETCH),
    ("index", "append", f"{HERE}/index", "--data", "{file}"),
    ("attribute", "--index", f"{HERE}/index", "--queries", "{file}", "--out", f"{HERE}/out/found.json"),
    ("attribute", "--index", f"{HERE}/index", "--text", "amber", "--data", "{file}", "--out", f"{HERE}/out/a.json"),
)
"""Commands that read documents."""


@st.composite
def _reading(draw: st.DrawFn, name: str, content: bytes | Path | None, *names: str) -> Case:
    """A file of documents and a command that reads it."""
    arguments = tuple(part.replace("{file}", f"{CASE}/{name}") for part in draw(st.sampled_from(_READERS)))
    return Case(arguments, {} if content == b"absent" else {name: content}, (name.rpartition("/")[2], *names))


@st.composite
def rows(draw: st.DrawFn) -> Case:
    """One bad row among good ones, as JSONL or in a JSON array."""
    before, bad, where = draw(_bad_values())
    names = () if where is None else (f"field {where}",)
    if draw(st.booleans()):
        content = json.dumps([*before, bad, {"text": "after"}], ensure_ascii=True,
                             indent=draw(st.sampled_from([None, 1])))
        return draw(_reading("rows.json", content.encode(), f"row {len(before) + 1}", *names))
    blank = draw(st.integers(0, 2))
    lines = [*map(json.dumps, before), *[""] * blank, json.dumps(bad), json.dumps({"text": "after"})]
    end = draw(st.sampled_from(["\n", "\r\n"]))
    return draw(_reading("rows.jsonl", end.join(lines).encode(), f"row {len(before) + blank + 1}", *names))


@st.composite
def lines(draw: st.DrawFn) -> Case:
    """One line of a JSONL file that is no JSON that can be read."""
    before = [json.dumps({"text": f"{draw(_TEXT)} {n}"}).encode() for n in range(draw(st.integers(0, 4)))]
    whole = json.dumps({"id": draw(_TEXT), "text": draw(_TEXT)}).encode()
    bad = draw(st.one_of(
        st.integers(1, len(whole) - 1).map(lambda cut: whole[:cut]),
        st.sampled_from([b"{'text': 'a'}", b'{"text": "a",}', b"text", b'{"text": "a"} {"text": "b"}', b"{text: a}",
                         b'{"text": "a"}]', b'{"text" "a"}', b'{"text": "a\tb"}', b'{"text": "a\x00b"}', b"\x00",
                         b'{"text": "\\x41"}', b'{"text": "\\ud8"}', b"[" * 100_000, b'{"text": ' * 20_000,
                         b'{"text": "a", "id": ' + b"7" * 5_000 + b"}", b"nul", b"undefined", b"<html>", b"--- a: b"]),
        st.binary(min_size=1, max_size=3).map(lambda junk: b'{"text": "a' + b"\xff\xfe" + junk + b'"}'),
        st.just(b'{"text": "caf\xe9"}'),
    ))  # fmt: skip
    bad = bad.replace(b"\n", b" ").replace(b"\r", b" ")
    return draw(_reading("lines.jsonl", b"\n".join([*before, bad, whole]), f"row {len(before) + 1}"))


@st.composite
def files(draw: st.DrawFn) -> Case:
    """A file that is none, or none of documents."""
    good = json.dumps({"text": draw(_TEXT)}).encode()
    name, content, *names = draw(st.sampled_from([
        ("none.jsonl", b"absent"), ("none.parquet", b"absent"), ("a/b/none.json", b"absent"), ("folder.jsonl", None),
        ("folder.parquet", None), ("folder.json", None), ("pool.txt", good), ("pool.csv", b"text\na\n"), ("pool", good),
        ("pool.JSONL", good), ("pool.jsonl.gz", good), ("pool.jsonl ", good), ("empty.jsonl", b""),
        ("empty.json", b""), ("empty.parquet", b""), ("blank.jsonl", b"\n \n\r\n\t\n"), ("bom.jsonl", b"\xef\xbb\xbf"),
        ("bom.json", b"\xef\xbb\xbf"), ("none.json", b"[]"), ("object.json", good), ("lines.json", good + b"\n" + good),
        ("cut.json", b"[" + good), ("cut.json", b"[" + good + b","), ("string.json", b'"text"'), ("null.json", b"null"),
        ("deep.json", b"[" * 100_000), ("number.json", b"[" + b"1" * 5_000 + b"]"), ("word.json", b"documents"),
        ("latin.json", b'[{"text": "caf\xe9"}]'), ("wide.jsonl", good.decode().encode("utf-16")),
        ("wide.json", (b"[" + good + b"]").decode().encode("utf-16")), ("text.parquet", good),
        ("json.parquet", b"PAR1"),
        ("magic.parquet", b"PAR1" + bytes(64) + b"PAR1"), ("zip.jsonl", b"PK\x03\x04" + bytes(30)),
        ("zip.parquet", b"PK\x03\x04" + bytes(30)), ("broken.jsonl", Path("/nowhere/at/all")),
        ("loop.jsonl", Path("loop.jsonl")), ("loop.parquet", Path("loop.parquet")), ("loop.json", Path("loop.json")),
        ("memory.jsonl", Path("/proc/self/mem")), ("memory.json", Path("/proc/self/mem")),
        ("memory.parquet", Path("/proc/self/mem")), ("device.jsonl", Path("/dev/null")),
        ("device.parquet", Path("/dev/null")), ("\x1b[31mred.jsonl", b"{", "\\x1b[31mred.jsonl"),
        ("two\nlines.jsonl", b"{", "two lines.jsonl"), ("x" * 300 + ".jsonl", b"absent", "xxx"),
    ]))  # fmt: skip
    case = draw(_reading(name, content))
    if name.endswith(("m.jsonl", "pool.jsonl")) and content not in (None, b"absent") and draw(st.booleans()):
        case = Case((*case.arguments, "--on-bad-row", "skip") if "attribute" not in case.arguments else case.arguments,
                    case.files, case.names)  # fmt: skip
    return Case(case.arguments, case.files, tuple(names) or case.names)


@st.composite
def junk(draw: st.DrawFn) -> Case:
    """Bytes at random, or a Parquet file that was cut off or damaged where it cannot be read without."""
    if draw(st.booleans()):
        name = draw(st.sampled_from(["junk.jsonl", "junk.json", "junk.parquet"]))
        content = draw(st.binary(min_size=1, max_size=200).filter(lambda some: some[:1] not in b"{[ \t\n\r\xef"))
        return draw(_reading(name, content))
    whole = _parquet({"text": [f"{draw(_TEXT)} {n}" for n in range(5)]})
    if draw(st.booleans()):
        return draw(_reading("cut.parquet", whole[: draw(st.integers(0, len(whole) - 1))]))
    place, damage = draw(st.integers(1, 8)), draw(st.binary(min_size=1, max_size=4))
    damaged = bytearray(whole)
    damaged[-place : len(whole) - place + len(damage)] = damage[:place]
    if damaged[-4:] == b"PAR1":  # only the length of the footer is another
        damaged[-1] ^= 0x20
    return draw(_reading("damaged.parquet", bytes(damaged)))


def _parquet(columns: Mapping[str, Any], names: Sequence[str] | None = None) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns) if names is None else pa.Table.from_arrays(list(columns.values()), names=list(names))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@st.composite
def columns(draw: st.DrawFn) -> Case:
    """A Parquet file with a bad column or a bad row."""
    import pyarrow as pa

    count = draw(st.integers(1, 5))
    place = draw(st.integers(0, count - 1))
    texts: list[Any] = [f"{draw(_TEXT)} {n}" for n in range(count)]

    def one(bad: Any) -> list[Any]:
        return [*texts[:place], bad, *texts[place + 1 :]]

    row, kind = f"row {place + 1}", draw(st.integers(0, 9))
    if kind == 0:
        name = draw(st.sampled_from(["Text", "body", "content", "text "]))
        return draw(_reading("a.parquet", _parquet({name: texts}), "field text"))
    if kind == 1:
        values, kinds = draw(st.sampled_from([
            ([1] * count, pa.int64()), ([1.5] * count, pa.float32()), ([True] * count, pa.bool_()),
            ([["a"]] * count, pa.list_(pa.string())), ([{"a": "b"}] * count, pa.struct([("a", pa.string())])),
            ([0] * count, pa.timestamp("us")), ([[("k", "v")]] * count, pa.map_(pa.string(), pa.string())),
            ([10**6] * count, pa.date32()), ([2**62] * count, pa.timestamp("us")), ([2**62] * count, pa.duration("s")),
            ([None] * count, pa.string()), ([None] * count, pa.null()), ([None] * count, pa.int32()),
        ]))  # fmt: skip
        return draw(_reading("a.parquet", _parquet({"text": pa.array(values, kinds)})))
    if kind == 2:
        return draw(_reading("a.parquet", _parquet({"text": one(None)}), row, "field text"))
    if kind == 3:
        return draw(_reading("a.parquet", _parquet({"text": one(draw(st.text(" \n\t", max_size=3)))}), row,
                             "field text"))
    if kind == 4:
        raw = [text.encode() for text in texts]
        raw[place] = b"caf\xe9" + draw(st.binary(max_size=3))
        broken = pa.array(raw, pa.binary())
        made = draw(st.sampled_from([broken, pa.Array.from_buffers(pa.string(), count, broken.buffers()),
                                     broken.dictionary_encode()]))  # fmt: skip
        return draw(_reading("a.parquet", _parquet({"text": made}), row, "field text"))
    if kind == 5:
        ids = [f"{n}" for n in range(count)] + ["0"]
        return draw(_reading("a.parquet", _parquet({"id": ids, "text": [*texts, "the last"]}), f"row {count + 1}",
                             "field id"))
    if kind == 6:
        name = draw(st.sampled_from(["label", "source"]))
        values = draw(st.sampled_from([[1] * count, [0.5] * count, [["a"]] * count, [{"a": 1}] * count,
                                       [False] * count]))
        return draw(_reading("a.parquet", _parquet({"text": texts, name: values}), "row 1", f"field {name}"))
    if kind == 7:
        name = draw(st.sampled_from(["text", "id", "label", "source"]))
        two = {"a": pa.array(texts), "b": pa.array(texts), "c": pa.array(texts)}
        return draw(_reading("a.parquet", _parquet(two, ["text", name, name]), f"field {name}"))
    if kind == 8:
        values = draw(st.sampled_from([[0.5] * count, [True] * count, [[1]] * count, [b"\xff"] * count,
                                       ["  "] * count]))
        return draw(_reading("a.parquet", _parquet({"text": texts, "id": values}), "row 1", "field id"))
    return draw(_reading("a.parquet", _parquet({"text": pa.array([], pa.string())})))


# Configurations -------------------------------------------------------------------------------------------------------

_COMMANDS = {"run": ("run", "plan"), "study": ("study", "plan"), "curate": ("curate",)}
_BOUNDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "run": {
        "seed": (-1, 2**32, 2**62, 1.5, None), "pool.size": (0, -5, 1.5), "pool.control_share": (0, 1, 1.5, -0.1),
        "pool.queries": (0, -1), "pool.near_duplicate": (0.1, 1.01), "pool.max_chars": (0,), "pool.max_pieces": (0, -1),
        "scorer.max_length": (0, 1, -3, 2**40), "scorer.batch_tokens": (0, 2**60), "scorer.shard_tokens": (0,),
        "scorer.processes": (0, 10**6), "scorer.threads": (0,), "arms.bm25.b": (-0.1, 1.1), "arms.bm25.k1": (0, -1),
        "arms.rise.sketch.kr": (0, -8, 10**9), "arms.rise.sketch.kh": (0, 10**7), "arms.rise.sketch.alpha": (-1, 2.5),
        "arms.rise.sketch.tau": (0,), "arms.rise.sketch.rho_cum": (0, 1.2), "arms.rise.sketch.seed": (-1, 2**32),
        "arms.rise.sketch.lambda_rh": (-0.1,), "selection.share": (0, 1, 1.5), "selection.resamples": (0, 10**7),
        "selection.confidence": (0, 1), "pretraining.epochs": (0, -1), "pretraining.batch_size": (0,),
        "pretraining.learning_rate": (0, 1.5, -1), "pretraining.seed": (-1, 2**32), "pretraining.processes": (0, 5000),
        "evaluation.max_length": (1,), "evaluation.resamples": (0,), "evaluation.confidence": (1, 0),
        "pool.sources.control.min_words": (0,), "pool.sources.control.join": (0, 1001),
        "pool.sources.control.share": (0, -1),
    },
    "study": {
        "seed": (-1, 2**32), "resamples": (0, 10**6), "confidence": (0, 1, 2), "scorer.max_length": (1,),
        "pools.brain.pool.size": (0, -1), "pools.brain.pool.queries": (0,), "rule.max_bytes": (0, -1),
        "methods.rise.sketch.kg": (0, 10**12), "methods.random.seed": (-1, 2**32),
    },
    "curate": {
        "seed": (-1, 2**32), "intake.near_duplicate": (0, 0.2, 1.5), "intake.max_chars": (0,),
        "budget.documents": (0, -3),
        "budget.tokens": (0,), "budget.quotas.*": (-1, -0.5), "scorer.batch_tokens": (0,),
        "signature.sketch.kh": (0,), "signature.fit.documents": (0,), "signature.sketch.alpha": (3, -1),
    },
}  # fmt: skip
"""Values outside of a field's bounds."""
_WRONG: dict[str, tuple[tuple[str, Any, str], ...]] = {
    "run": (
        ("name", "../../x", "name"), ("name", "Upper", "name"), ("name", "a/b", "name"), ("name", "", "name"),
        ("name", "a\nb", "name"), ("name", 5, "name"), ("name", "\ud800", "name"), ("arms", {}, "arms"),
        ("arms", {"../x": {"method": "random"}}, "../x"), ("arms", {"base": {"method": "random"}}, "base"),
        ("arms", {"readout": {"method": "random"}}, "readout"), ("arms", {"tokens": {"method": "bm25"}}, "tokens"),
        ("arms", {"x.partial": {"method": "random"}}, "x.partial"), ("arms", {"A": {"method": "random"}}, "'A'"),
        ("arms", {"a": {"method": "nonsense"}}, "arms.a"), ("arms", {"a": {}}, "arms.a"),
        ("arms", {"a": None}, "arms.a"),
        ("arms", {"a": {"method": "random", "k": 3}}, "arms.a"), ("arms.rise.calibration", "power:0", "calibration"),
        ("arms.rise.calibration", "power:7", "calibration"), ("arms.rise.calibration", "nonsense", "calibration"),
        ("arms.rise.index_type", "bit", "median-bit"), ("arms.rise.index_type", "fp8", "index_type"),
        ("pool.control_label", "none such", "none such"), ("pool.sources", {}, "sources"),
        ("pool.heldout", {"other": 1}, "other"), ("pool.heldout", {"control": 0}, "control"),
        ("pool.sources.control.reader", "wikipedia", "reader"), ("pool.sources.control.path", None, "reader"),
        ("pool.sources.control.unit", "page", "unit"), ("pool.sources.control.splits", [], "splits"),
        ("pool.sources.control.label", "junk", "control"), ("pool.on_bad_row", "ignore", "on_bad_row"),
        ("pool.lengths", [{"words": [5, 2], "share": 1}], "lengths"),
        ("pool.lengths", [{"words": [1, 2], "share": 0.5}], "1"),
        ("pool.sources.control", {"label": "control", "reader": "nonsense"}, "nonsense"),
        ("pool.sources.control.min_words", 10**6, "min_words"), ("selection.k", 13, "13"), ("selection.k", 3, "share"),
        ("selection.positive", "nobody", "nobody"), ("selection.purity_at", [1.5], "purity_at"),
        ("pretraining.processes", 4, "batch_size"), ("scorer.precision", "float8", "precision"),
        ("scorer.device_map", "everywhere", "device_map"), ("pretraining.schedule", "linear", "schedule"),
        ("evaluation.arc", {"limit": 1}, "limit"), ("evaluation.ruler_cwe", {"length": 10}, "length"),
    ),
    "study": (
        ("pools", {}, "pools"), ("pools.brain.split", "test", "split"), ("pools.brain.ks", [], "ks"),
        ("pools.brain.ks", [3, 2], "ks"), ("pools.brain.ks", [0, 2], "ks"), ("pools.brain.ks", [500], "500"),
        ("pools.brain.pool", "none.yaml", "none.yaml"), ("pools.brain.pool", "inbox", "inbox"),
        ("pools.brain.pool", {"file": "none.yaml"}, "none.yaml"), ("pools.brain.task", "", "task"),
        ("seeds", [], "seeds"),
        ("seeds", [1, 1], "seeds"), ("paradigms", ["predict", "predict"], "paradigms"),
        ("paradigms", ["guess"], "paradigms"),
        ("paradigms", ["recall"], "finetuning"), ("default", "nobody", "nobody"), ("rule.candidates", [], "candidates"),
        ("rule.candidates", ["nobody"], "nobody"), ("methods", {}, "methods"),
        ("methods", {"../x": {"method": "random"}}, "../x"),
        ("methods.rise.method", "nonsense", "methods.rise"), ("pools.brain.pool.size", 1, "control_share"),
    ),
    "curate": (
        ("queries", 5, "queries"), ("budget", {}, "budget"), ("budget", {"quotas": {"*": 0.5}}, "budget"),
        ("budget.quotas", {"a": 1.5}, "quotas"), ("budget.threshold", float("nan"), "threshold"),
        ("intake.sources", {}, "sources"), ("intake.sources", {"a": {}}, "folder"),
        ("intake.sources", {"a/b": {"folder": "x"}}, "a/b"),
        ("intake.sources.inbox.dataset", "some/data", "folder"), ("intake.sources.inbox.pattern", "/etc/*", "pattern"),
        ("intake.sources.inbox.pattern", "../*", "pattern"), ("intake.sources.inbox.pattern", "a**b", "pattern"),
        ("intake.sources.inbox.pattern", "", "pattern"), ("intake.sources.inbox.pattern", ".", "pattern"),
        ("intake.on_bad_row", "ignore", "on_bad_row"), ("signature.stored", "fp64", "stored"),
        ("signature.fit", None, "median-bit"),
        ("signature.fit.name", "nonsense", "name"), ("name", "..", "name"),
    ),
}  # fmt: skip
"""Field, a value that does not go, and what the line must hold."""
_NEEDED = {
    "run": ("name", "pool", "scorer", "arms", "pretraining", "pool.size", "pool.sources", "pool.queries",
            "scorer.model",
            "pretraining.model", "pool.sources.junk.label", "arms.rise.method"),
    "study": ("name", "scorer", "pools", "methods", "pools.brain.task", "pools.brain.split", "pools.brain.pool",
              "rule.candidates", "scorer.model"),
    "curate": ("name", "intake", "queries", "scorer", "budget", "intake.sources", "scorer.model"),
}  # fmt: skip


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = value


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every field below a mapping, and every mapping too, by its path."""
    for key, value in values.items():
        here = f"{path}.{key}" if path else key
        yield here, value
        if isinstance(value, dict):
            yield from _leaves(value, here)


_GOOD = _configurations(Path(HERE))
_FREE = ("pools.brain.pool", "pool.heldout")  # a path is as good as a mapping; any name is a key

Change = tuple[str, Any, str]
"""A field, a value that does not go, and what the line must hold."""


@st.composite
def _changes(draw: st.DrawFn, kind: str) -> Change:
    """A field of a configuration that is made wrong."""
    which = draw(st.integers(0, 3))
    if which == 0:
        path = draw(st.sampled_from(sorted(_BOUNDS[kind])))
        return path, draw(st.sampled_from(_BOUNDS[kind][path])), path.rpartition(".")[2]
    if which == 1:
        return draw(st.sampled_from(_WRONG[kind]))
    everything = [(path, value) for path, value in _leaves(_GOOD[kind]) if path not in _FREE]
    if which == 2:
        named = ("sources", "pools", "arms", "methods", "quotas", "heldout")  # their keys are free
        above = draw(st.sampled_from(["", *(path for path, value in everything if isinstance(value, dict)
                                            and path.rpartition(".")[2] not in named)]))  # fmt: skip
        name = draw(st.sampled_from(["nonsense", "sed", "Seed", "model_path", "__class__", "x y"]))
        return f"{above}.{name}".removeprefix("."), draw(st.sampled_from([1, "a", None, [], {}])), name
    path, value = draw(st.sampled_from(everything))
    wrong: tuple[Any, ...] = ([1, 2], {"x": {"y": 1}}, [[]])
    if isinstance(value, dict):
        wrong = (7, "word", [1], True, [{"a": 1}])
    elif isinstance(value, list):
        wrong = (7, {"a": 1}, True, [{"a": 1}])
    elif isinstance(value, bool):
        wrong = (*wrong, 7, "perhaps")
    elif isinstance(value, int | float):
        wrong = (*wrong, "many", True, False, "", "1e", float("nan"), float("inf"))
    elif isinstance(value, str):
        wrong = (*wrong, 7, 1.5, True)
    return path, draw(st.sampled_from(wrong)), path.rpartition(".")[2]


@st.composite
def fields(draw: st.DrawFn) -> Case:
    """A configuration with a field that is missing, unknown, of the wrong type or out of bounds."""
    kind = draw(st.sampled_from(sorted(_GOOD)))
    values = deepcopy(_GOOD[kind])
    names: tuple[str, ...]
    if draw(st.integers(0, 9)) == 0:
        path = draw(st.sampled_from(_NEEDED[kind]))
        above, _, last = path.rpartition(".")
        place = values
        for part in above.split(".") if above else ():
            place = place[part]
        del place[last]
        names = (last,)
    else:
        path, value, held = draw(_changes(kind))
        _put(values, path, value)
        names = (held,)
    text = yaml.safe_dump(values, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.booleans()))
    return _configured(draw, kind, text.encode(), *names)


@st.composite
def set_fields(draw: st.DrawFn) -> Case:
    """``--set`` of nonsense over a configuration that is in order."""
    kind = draw(st.sampled_from(sorted(_GOOD)))
    if draw(st.integers(0, 2)) == 0:
        setting = draw(st.sampled_from([
            "seed", "=5", "", "=", "a..b=1", ".=1", "seed.=1", ".seed=1", "seed=[", "seed={", "seed=!!timestamp x",
            "seed=&a [*a", "name.x=1", "seed.x.y=1", "scorer=1", "scorer.model.x=1", "seed=!!python/name:os.system",
            "seed=\t- a", "seed=2024-99-99", "seed=" + "9" * 30, "seed=" + "[" * 500, "scorer=null", "seed=",
            "seed=yes",
            'name="\\ud800"', "name='", "name=\x07", "seed=0x_", "scorer.max_length=1e9999", "seed: 5", "nonsense=1",
            "__init__=1", "scorer.__class__=1",
        ]))  # fmt: skip
        return _set(draw, kind, setting)
    path, value, _ = draw(_changes(kind).filter(lambda change: "*" not in change[0] and "\n" not in str(change[1])))
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return _set(draw, kind, f"{path}={text.removesuffix('...' + chr(10)).strip()}")


def _set(draw: st.DrawFn, kind: str, setting: str) -> Case:
    command = draw(st.sampled_from(_COMMANDS[kind]))
    out = () if command == "plan" else ("--out", f"{HERE}/claimed")
    first = () if draw(st.booleans()) or command == "plan" else ("--set", "title=another")
    case = Case((command, f"{HERE}/{kind}.yaml", *out, *first, "--set", setting))
    # Either the setting itself cannot be read, or the file is named with the field.
    return Case(case.arguments, {}, ())


def _configured(draw: st.DrawFn, kind: str, content: bytes, *names: str) -> Case:
    command = draw(st.sampled_from(_COMMANDS[kind]))
    out = () if command == "plan" else ("--out", f"{HERE}/claimed")
    return Case((command, f"{CASE}/conf.yaml", *out), {"conf.yaml": content}, ("conf.yaml", *names))


_LETTERS = list(zip("abcdefgh", "bcdefghi", strict=True))
_MERGES = "a: &a {x: 1, y: 2, z: 3}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n" for before, name in _LETTERS)
_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in _LETTERS)
"""Bombs: 9^8 keys by merging, 9^9 values by reference."""


@st.composite
def documents(draw: st.DrawFn) -> Case:
    """A configuration file that is none, or no YAML, or a bomb."""
    kind = draw(st.sampled_from(sorted(_GOOD)))
    whole = yaml.safe_dump(_GOOD[kind], sort_keys=False)
    which = draw(st.integers(0, 7))
    if which == 0:
        name, content = draw(st.sampled_from([
            ("none.yaml", None), ("folder.yaml", b""), ("memory.yaml", Path("/proc/self/mem")),
            ("loop.yaml", Path("loop.yaml")),
            ("broken.yaml", Path("/nowhere")), ("a/none.yaml", None), ("x" * 300, None), ("\x1b[2Jnone.yaml", None),
        ]))  # fmt: skip
        present: dict[str, bytes | Path | None] = {} if content is None else {name: None if content == b"" else content}
        command = draw(st.sampled_from(("run", "study", "curate", "plan")))
        shown = name.replace("\x1b", "\\x1b").rpartition("/")[2]
        return Case((command, f"{CASE}/{name}"), present, (shown[:100],))
    if which == 1:
        key = draw(st.sampled_from(sorted(_GOOD[kind])))
        return _configured(draw, kind, f"{whole}{key}: {draw(st.sampled_from(['1', 'a', '{}', 'null']))}\n".encode(),
                           key, "row")
    if which == 2:
        bad = draw(st.sampled_from([
            b"", b"\n", b"# nothing\n", b"null", b"- a\n- b\n", b"word", b"5", b"[]", b"--- {}\n--- {}\n", b"{}",
            b"~: ~",
            b"5: 6", b"a: 1", b"\xff\xfea: 1", b"name: caf\xe9", b"\x00", b"name: \x07", b"%YAML 9.9\n---\na: 1",
            b"&a [*a]",
            b"a: &a {b: *a}", b"<<: 5", b"<<: *a", b"? {a: b}\n: c", b"!!python/object/apply:os.system [true]",
            b"!!set {a, b}", b"!!binary =", b"!!omap [a: 1]", b"a: !!int x", b"a: !!float x", b"a: !!bool x",
            b"a: !!timestamp x",
            b"a: !!null x", b"a: 2024-13-45", b"a: 0x_", b"a: 0b_", b"a: 1:99:99999999999999999999",
            b"pool: &p {sources: *p}\nname: a",
            b"a: " + b"[" * 5_000, b"a: " + b"{a: " * 2_000, b"- " * 3_000, b"a: " + b"9" * 5_000, b"a: 1" + b"0" * 40,
            _MERGES.encode(), _LAUGHS.encode(), b"a:\n\t- b", b"a: 'b", b'a: "b', b"a: [b", b"a: {b", b"a: *b",
            b"a: |1\nb", b"@a", b"`a`",
            b"a: b: c", b": : :", b"!a!b c", b'a: "\\q"', b'a: "\\xZZ"', b"? ? ?", b"\xef\xbb\xbf\xef\xbb\xbf: 1",
        ]))  # fmt: skip
        return _configured(draw, kind, bad)
    if which == 3:
        rows = whole.splitlines()
        place = draw(st.integers(0, len(rows) - 1))
        row = draw(st.sampled_from(["\t- a", "a: [", "*nobody", "'", '"', "}", "]", "@", "%", "a: b: c", "&", "!", "`",
                                    "- -"]))
        text = "\n".join([*rows[:place], row, *rows[place:]])
        return _configured(draw, kind, text.encode())
    if which == 4:
        place = draw(st.integers(0, len(whole.encode())))
        raw = whole.encode()
        return _configured(draw, kind, raw[:place] + draw(st.sampled_from([b"\xff", b"\x00", b"\x1b", b"\x7f",
                                                                           b"\xc3\x28"])) + raw[place:])
    if which == 5:
        # Cut where a needed key is lost.
        key = draw(st.sampled_from([key for key in _NEEDED[kind] if "." not in key]))
        place = whole.index(f"\n{key}:") if f"\n{key}:" in whole else 0
        return _configured(draw, kind, whole[:place].encode())
    if which == 6:
        return _configured(draw, kind, draw(st.binary(min_size=1, max_size=100)))
    other = draw(st.sampled_from([name for name in sorted(_GOOD) if name != kind]))
    command = "curate" if kind == "curate" else kind
    text = yaml.safe_dump(_GOOD[other])
    return Case((command, f"{CASE}/conf.yaml", "--out", f"{HERE}/claimed"), {"conf.yaml": text.encode()},
                ("conf.yaml",))


# Command lines --------------------------------------------------------------------------------------------------------

_MODEL, _POOL = ("--model", f"{HERE}/model"), ("--pool", f"{HERE}/pool.jsonl")
_QUERIES = ("--queries", f"{HERE}/queries.jsonl")
_SCORE = ("score", *_POOL, *_QUERIES, "--out", OUT)
_BUILD = ("index", "build", *_MODEL, "--data", f"{HERE}/pool.jsonl", "--out", f"{HERE}/out/new")
_ASK = ("attribute", "--index", f"{HERE}/index", "--text", "amber")


def _leaf_commands(group: click.Group, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _leaf_commands(command, (*above, name))
        else:
            yield (*above, name), command


def _needed(command: click.Command) -> list[str]:
    """What a command needs before it looks at anything."""
    given: list[str] = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument) and parameter.required:
            given.append(f"{HERE}/file")
        elif isinstance(parameter, click.Option) and parameter.required:
            choices = parameter.type.choices if isinstance(parameter.type, click.Choice) else [f"{HERE}/none"]
            given += [parameter.opts[0], str(next(iter(choices)))]
    return given


_NO_NUMBER = st.sampled_from(["x", "", "1.2.3", "0x10", "1e", "--", " ", "١x", "None", "1,5", "\x1b[31m", "NaN%"])
_WORDS_OF_NOBODY = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)


@st.composite
def options(draw: st.DrawFn) -> Case:
    """What the command line's parser must refuse: unknown, missing, of the wrong type, too many."""
    from flows import cli

    name, command = draw(st.sampled_from(list(_leaf_commands(cli.rise))))
    taken = [option for option in command.params if isinstance(option, click.Option)]
    typed = [option for option in taken if not option.is_flag
             and isinstance(option.type, click.types.IntParamType | click.types.FloatParamType | click.Choice)]
    which = draw(st.integers(0, 5))
    if which == 0:
        unknown = f"--{draw(st.sampled_from(['nonsense', 'pol', 'Out', 'help-me', 'x=1', 'no-such', '🙂']))}"
        shown = unknown.partition("=")[0]
        return Case((*name, *_needed(command), unknown),
                    names=(shown if shown.isprintable() else shown.encode("unicode_escape").decode(),))
    if which == 1:
        needed = [parameter for parameter in command.params if parameter.required]
        if needed:
            left_out = draw(st.sampled_from(needed))
            rest = click.Command("rest", params=[one for one in command.params if one is not left_out])
            shown = left_out.opts[0] if isinstance(left_out, click.Option) else str(left_out.human_readable_name)
            return Case((*name, *_needed(rest)), names=(shown,))
    if which == 2 and typed:
        option = draw(st.sampled_from(typed))
        value = draw(st.one_of(_NO_NUMBER, _WORDS_OF_NOBODY.filter(_is_no_number)))
        if isinstance(option.type, click.Choice) and value in map(str, option.type.choices):
            value += "?"
        return Case((*name, *_needed(command), f"{option.opts[0]}={value}"), names=(option.opts[0],))
    if which == 3:
        ranged = [option for option in typed if isinstance(option.type, click.IntRange | click.FloatRange)]
        if ranged:
            option = draw(st.sampled_from(ranged))
            assert isinstance(option.type, click.IntRange | click.FloatRange)
            value = str((option.type.min or 0) - draw(st.integers(1, 10**9)))
            if option.type.max is not None and draw(st.booleans()):
                value = str(int(option.type.max) + draw(st.integers(1, 10**9)) * 10**12)
            return Case((*name, *_needed(command), f"{option.opts[0]}={value}"), names=(option.opts[0],))
    if which == 4 and not any(parameter.nargs == -1 for parameter in command.params):
        extra = draw(st.lists(st.sampled_from(["more", "and", "x"]), min_size=1, max_size=3))
        places = [f"{HERE}/file" for parameter in command.params if isinstance(parameter, click.Argument)]
        given = [part for part in _needed(command) if part != f"{HERE}/file"]
        return Case((*name, *given, *places, *extra), names=(extra[0],))
    valued = [option for option in taken if not option.is_flag]
    flags = [option for option in taken if option.is_flag]
    if flags and draw(st.booleans()):
        flag = draw(st.sampled_from(flags))
        return Case((*name, *_needed(command), f"{flag.opts[0]}=yes"), names=(flag.opts[0],))
    if valued:
        option = draw(st.sampled_from(valued))
        return Case((*name, *_needed(command), option.opts[0]), names=(option.opts[0],))
    stranger = draw(st.sampled_from(["nonsense", "scores", "Run", "index2", "..", "run ", "🙂"]))
    return Case(draw(st.sampled_from([(stranger,), ("index", stranger)])), names=(stranger.strip(),))


def _is_no_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return True
    return False


_MEANING: tuple[tuple[tuple[str, ...], str], ...] = (
    (_SCORE, "--model"), (("score", *_POOL, *_MODEL, "--out", OUT), "--queries"),
    ((*_SCORE, *_MODEL, "--out", f"{HERE}/inbox"), "inbox"),
    ((*_SCORE, *_MODEL, "--out", f"{HERE}/file/x.parquet"), "file"),
    ((*_SCORE, "--method", "bm25", "--out", f"{HERE}/pool.jsonl"), "pool.jsonl"),
    ((*_SCORE, "--method", "bm25", "--out", f"{HERE}/out/../queries.jsonl"), "queries.jsonl"),
    ((*_SCORE, "--method", "bm25", "--per-query", OUT), "scores.parquet"),
    ((*_SCORE, "--method", "bm25", "--per-query", f"{HERE}/inbox"), "inbox"),
    ((*_SCORE, "--method", "random", "--per-query", f"{HERE}/out/q.parquet"), "--per-query"),
    ((*_SCORE, *_MODEL, "--calibration", "nonsense"), "calibration"),
    ((*_SCORE, *_MODEL, "--calibration", "power:0"), "calibration"),
    ((*_SCORE, *_MODEL, "--calibration", "power:nan"), "calibration"),
    ((*_SCORE, *_MODEL, "--dtype", "bit"), "median-bit"),
    ((*_SCORE, *_MODEL, "--lambda-rh", "0", "--lambda-gh", "0"), "--lambda-rh"),
    ((*_SCORE, *_MODEL, "--lambda-rh", "nan"), "lambda_rh"),
    ((*_SCORE, *_MODEL, "--lambda-gh", "inf"), "lambda_gh"), ((*_SCORE, *_MODEL, "--lambda-rh", "-1"), "lambda_rh"),
    ((*_SCORE, *_MODEL, "--alpha", "nan"), "alpha"), ((*_SCORE, *_MODEL, "--alpha", "5"), "alpha"),
    ((*_SCORE, *_MODEL, "--kr", "0"), "kr"),
    ((*_SCORE, *_MODEL, "--kh", "-3"), "kh"), ((*_SCORE, *_MODEL, "--kg", "99999999999"), "kh (kr + kg)"),
    ((*_SCORE, *_MODEL, "--max-length", "1"), "max_length"),
    ((*_SCORE, *_MODEL, "--max-length", "9" * 30), "max_length"),
    ((*_SCORE, *_MODEL, "--seed", "-1"), "seed"), ((*_SCORE, *_MODEL, "--seed", str(2**32)), "seed"),
    ((*_SCORE, *_MODEL, "--option", "nonsense=1"), "nonsense"), ((*_SCORE, *_MODEL, "--option", "sketch=5"), "sketch"),
    ((*_SCORE, *_MODEL, "--option", "sketch.kr=0"), "kr"), ((*_SCORE, *_MODEL, "--option", "method=random"), "method"),
    ((*_SCORE, *_MODEL, "--option", "=3"), "--option"), ((*_SCORE, *_MODEL, "--option", "alpha"), "--option"),
    ((*_SCORE, *_MODEL, "--option", "sketch.kr=["), "--option"),
    ((*_SCORE, *_MODEL, "--method", "hidden", "--option", "layer=0"), "layer"),
    ((*_SCORE, *_MODEL, "--method", "hidden", "--option", "layer=middle"), "layer"),
    ((*_SCORE, *_MODEL, "--method", "lm-head", "--option", "variant=some"), "variant"),
    ((*_SCORE, *_MODEL, "--method", "lm-head", "--option", "normalize=no", "--option", "variant=gradient-sketch"),
     "normalize"),
    ((*_SCORE, "--method", "bm25", "--option", "b=2"), "b"),
    ((*_SCORE, "--method", "bm25", "--option", "k1=yes"), "k1"),
    ((*_SCORE, *_MODEL, "--method", "rapidin", "--option", "k=0"), "k"),
    ((*_SCORE, *_MODEL, "--method", "rapidin", "--option", "learning_rates=[1.0]"), "learning rates"),
    ((*_BUILD, "--dtype", "bit", "--calibration", "none"), "--calibration"),
    ((*_BUILD, "--calibration", "nonsense"), "name"),
    ((*_BUILD, "--fit-documents", "0", "--dtype", "bit"), "documents"),
    ((*_BUILD, "--shard-tokens", "0"), "shard_tokens"),
    ((*_BUILD, "--processes", "0"), "processes"), ((*_BUILD, "--processes", "100000"), "processes"),
    ((*_BUILD, "--kr", "0"), "kr"),
    ((*_BUILD, "--out", f"{HERE}/inbox"), "inbox"), ((*_BUILD, "--out", f"{HERE}/file"), "file"),
    ((*_BUILD, "--out", f"{HERE}/file/x"), "file"),
    ((*_BUILD, "--out", f"{HERE}/index", "--kr", "9"), "index"),
    ((*_BUILD, "--data", f"{HERE}/long.jsonl"), "positions"),
    (("index", "append", f"{HERE}/index", "--data", f"{HERE}/pool.jsonl"), "d0"),
    (("index", "append", f"{HERE}/none", "--data", f"{HERE}/pool.jsonl"), "none"),
    (("index", "append", f"{HERE}/file", "--data", f"{HERE}/pool.jsonl"), "file"),
    (("index", "append", f"{HERE}/index", "--data", f"{HERE}/queries.jsonl", "--model", f"{HERE}/inbox"), "inbox"),
    (("index", "info", f"{HERE}/none"), "none"), (("index", "info", f"{HERE}/file"), "file"),
    (("index", "info", f"{HERE}/inbox"), "inbox"),
    (("index", "verify", f"{HERE}/none"), "none"), (("index", "verify", f"{HERE}/claimed"), "claimed"),
    (("index", "verify", ""), ""),
    (("index", "convert", f"{HERE}/none", "--out", f"{HERE}/out/c", "--dtype", "bit"), "none"),
    (("index", "convert", f"{HERE}/index", "--out", f"{HERE}/inbox", "--dtype", "bit"), "inbox"),
    (("index", "convert", f"{HERE}/index", "--out", f"{HERE}/out/c", "--dtype", "bit", "--calibration", "center"),
     "median-bit"),
    (("index", "convert", f"{HERE}/index", "--out", f"{HERE}/out/c", "--dtype", "fp32", "--calibration", "power:9"),
     "name"),
    (("attribute", "--index", f"{HERE}/index"), "--text"), ((*_ASK, "--prompt", "a"), "--text"),
    ((*_ASK, *_QUERIES), "--text"),
    (("attribute", "--index", f"{HERE}/index", "--text", ""), "--text"),
    (("attribute", "--index", f"{HERE}/index", "--text", " \t\n"), "--text"),
    (("attribute", "--index", f"{HERE}/index", "--text", "a\udcff"), "--text"),
    (("attribute", "--index", f"{HERE}/index", "--text", "x"), "single token"),
    (("attribute", "--index", f"{HERE}/none", "--text", "amber"), "none"),
    (("attribute", "--index", f"{HERE}/file", "--text", "amber"), "file"),
    ((*_ASK, "--tokens", "3"), "--data"), ((*_ASK, "--calibration", "nonsense"), "calibration"),
    ((*_ASK, "--calibration", "center+spread"), "spread"),
    ((*_ASK, "--out", f"{HERE}/inbox"), "inbox"),
    ((*_ASK, "--data", f"{HERE}/pool.jsonl", "--out", f"{HERE}/pool.jsonl"), "pool.jsonl"),
    ((*_ASK, "--model", f"{HERE}/inbox"), "inbox"), ((*_ASK, "--model", ""), "model"),
    (("attribute", "--index", f"{HERE}/index", "--prompt", "a " * 600), "--prompt"),
    (("report", f"{HERE}/none"), "none"), (("report", f"{HERE}/claimed"), "claimed"),
    (("report", f"{HERE}/index"), "index"), (("report", f"{HERE}/file"), "file"),
    (("status", f"{HERE}/none"), "none"), (("status", f"{HERE}/inbox"), "inbox"), (("status", f"{HERE}/file"), "file"),
    (("status",), "runs"),
    (("plan",), "--documents"), (("plan", f"{HERE}/run.yaml", "--documents", "5"), "--documents"),
    (("plan", "--documents", "5"), "--tokens"),
    (("plan", "--documents", "5", "--tokens", "9"), "--model"),
    (("plan", "--documents", "5", "--tokens", "9", *_MODEL, "--parameters", "9"), "--model"),
    (("plan", "--documents", "5", "--tokens", "9", "--parameters", "nan"), "--parameters"),
    (("plan", "--gpus", "3", "--documents", "5"), "--gpu"),
    (("plan", "--documents", "5", "--tokens", "9", "--model", f"{HERE}/inbox"), "inbox"),
    (("plan", f"{HERE}/pool.yaml"), "pool.yaml"),
    (("plan", "--documents", "5", "--tokens", "9", "--model", f"{HERE}/claimed/config.yaml"), "config.yaml"),
    (("plan", "--documents", "5", "--tokens", "9", *_MODEL, "--kr", "0"), "kr"),
    (("plan", f"{HERE}/index/plan.json"), "plan.json"),
    (("run", f"{HERE}/run.yaml", "--refresh", "nonsense"), "nonsense"),
    (("study", f"{HERE}/study.yaml", "--refresh", "evaluation"), "evaluation"),
    (("run", f"{HERE}/run.yaml", "--out", f"{HERE}/inbox"), "inbox"),
    (("run", f"{HERE}/run.yaml", "--out", f"{HERE}/file"), "file"),
    (("run", f"{HERE}/run.yaml", "--out", f"{HERE}/claimed"), "claimed"),
    (("study", f"{HERE}/study.yaml", "--out", f"{HERE}/index"), "index"),
    (("study", f"{HERE}/study.yaml", "--choose", "--out", f"{HERE}/none"), "none"),
    (("curate", f"{HERE}/curate.yaml", "--out", f"{HERE}/inbox"), "inbox"),
    (("curate", f"{HERE}/curate.yaml", "--out", f"{HERE}/file"), "file"),
    (("curate", f"{HERE}/curate.yaml", "--out", f"{HERE}/claimed"), "claimed"),
    (("bench", "nonsense"), "nonsense"), (("serve", "--port", "{port}", "--home", f"{HERE}/out/home"), "port"),
    (("serve", "--home", f"{HERE}/file"), "file"),
)  # fmt: skip
"""Command lines that parse and mean nothing, and what the line must name."""


@st.composite
def meanings(draw: st.DrawFn) -> Case:
    """A command line that the parser takes and that cannot be meant."""
    arguments, held = draw(st.sampled_from(_MEANING))
    spare = {"score": ("--on-bad-row", "skip"), "attribute": ("--top", str(draw(st.integers(1, 10**30))))}
    more = spare.get(arguments[0], ()) if draw(st.booleans()) else ()
    return Case((*arguments, *more), names=(held,) if held else ())


_SHAPE = {"model_type": "llama", "vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@st.composite
def models(draw: st.DrawFn) -> Case:
    """A model that is none."""
    spec = draw(st.one_of(st.just("dir"), st.sampled_from([
        "", "  ", f"{HERE}/none", "./none", "~/none-at-all", f"{HERE}/file", f"{HERE}/inbox", "a/b/c", "nobody here",
        "..", "x\ny", "-x/y",
        "pypi:", "pypi:x", "pypi:x==1", "pypi:x==1/", "pypi:x/y", "pypi:nothing==0/model", "pypi:../x==1/y",
        "pypi:x==1#sha256=../../y/z",
        "pypi:x==1/y#sha256=zz", "pypi:x==1\n--index-url=http://127.0.0.1/y/z", "pypi:x==1#sha256=" + "0" * 63 + "/y",
        "🙂/🙂🙂",
    ])))  # fmt: skip
    content: dict[str, bytes | Path | None] = {}
    if spec == "dir":
        spec = f"{CASE}/model"
        config = draw(st.sampled_from([
            b"", b"{", b"[]", b"null", b'"llama"', b"{}", b"\xff",
            json.dumps({**_SHAPE, "model_type": "nonsense"}).encode(),
            json.dumps({**_SHAPE, "model_type": 5}).encode(), json.dumps({**_SHAPE, "hidden_size": "wide"}).encode(),
            json.dumps({**_SHAPE, "num_attention_heads": 0}).encode(),
            json.dumps({**_SHAPE, "hidden_size": -1}).encode(),
            json.dumps(_SHAPE).encode(), json.dumps({**_SHAPE, "model_type": "bert"}).encode(),
            json.dumps({"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
                        "model_type": "evil"}).encode(),
        ]))  # fmt: skip
        content = {"model/config.json": config, "model/evil.py": b"raise SystemExit('remote code ran')\n"}
        if draw(st.booleans()):
            tokenizer = ("tokenizer.json", "tokenizer_config.json")
            content |= {f"model/{name}": Path(f"../../../model/{name}") for name in tokenizer}
            content["model/model.safetensors"] = draw(st.sampled_from([
                b"", b"\x00" * 8, b"\x05\x00\x00\x00\x00\x00\x00\x00{}   ", b"x" * 500,
                (10**12).to_bytes(8, "little") + b"{}",
            ]))  # fmt: skip
        elif draw(st.booleans()):
            content["model/tokenizer.json"] = draw(st.sampled_from([b"", b"{}", b"[]", b'{"model": {"type": "BPE"}}',
                                                                    b"\xff"]))
    arguments = draw(st.sampled_from([_SCORE, _BUILD, (*_SCORE, "--method", "length"), (*_SCORE, "--method",
                                                                                        "perplexity")]))
    return Case((*arguments, "--model", spec), content)


# Odd ------------------------------------------------------------------------------------------------------------------


@st.composite
def oddities(draw: st.DrawFn) -> Case:
    """Documents that are unusual and no mistake."""
    rows = [{"text": f"{draw(_ODD_TEXT)} {n}", **({"id": f"{draw(_ODD_ID)}{n}"} if draw(st.booleans()) else {}),
             **({"label": str(draw(_ODD_ID))} if draw(st.booleans()) else {})} for n in range(draw(st.integers(1, 5)))]
    plain = draw(st.booleans())
    name, content = draw(st.sampled_from(["rows.jsonl", "rows.json", "rows.parquet"])), b""
    if name == "rows.parquet":
        content = _parquet({key: [row.get(key) for row in rows] for key in ("text", "id", "label")})
    elif name == "rows.json":
        content = json.dumps(rows, ensure_ascii=plain).encode()
    else:
        lines = [json.dumps(row, ensure_ascii=plain).encode() for row in rows]
        content = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(lines)
        if draw(st.booleans()):
            content += b'\n{"text": ' + draw(st.sampled_from([b"1", b"", b'" "', b"null"])) + b"}\n"
    if name != "rows.parquet" and draw(st.booleans()):
        content = b"\xef\xbb\xbf" + content
    method = draw(st.sampled_from([("bm25",), ("random",), ("length", *_MODEL), ("rise", *_MODEL, *SKETCH)]))
    return Case(("score", "--pool", f"{CASE}/{name}", *_QUERIES, "--out", OUT, "--method", *method, "--on-bad-row",
                 draw(st.sampled_from(["skip", "skip", "error"]))), {name: content}, odd=True)  # fmt: skip


KINDS: dict[str, tuple[Callable[[], Strategy], int]] = {
    "a bad row": (rows, 360), "a bad line": (lines, 220), "no file of documents": (files, 200),
    "damaged or random bytes": (junk, 160),
    "a bad Parquet column": (columns, 180), "a bad field of a configuration": (fields, 300),
    "no configuration": (documents, 200),
    "--set of nonsense": (set_fields, 120), "a bad option": (options, 120),
    "a command line without a meaning": (meanings, 110),
    "no model": (models, 30),
}  # fmt: skip
"""Kinds of bad input, and how many of each the long run draws: 2,000."""
ODD = 200
FIGURES = ("tried", "right", "traceback", "partial", "silent", "taken", "other")
"""What is counted: taken is bad input that went through; other is a line that names too little, another exit status."""
_SHOWN = 40


def drawn(strategy: Strategy, count: int, judge: Callable[[Case], None]) -> None:
    """Call ``judge`` with ``count`` different cases, the same ones every time; with fewer where no more are found."""
    seen: set[str] = set()

    @settings(max_examples=5 * count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def each(case: Case) -> None:
        if len(seen) < count and repr(case) not in seen:
            seen.add(repr(case))
            judge(case)

    each()


def sweep(world: World, strategy: Strategy, count: int) -> dict[str, Any]:
    """Bring ``count`` cases about and count what came of them."""
    came: Counter[str] = Counter()
    shown: list[dict[str, Any]] = []

    def judge(case: Case) -> None:
        port = str(world.port) if "{port}" in case.arguments else ""
        case = Case(tuple(part.replace("{port}", port) for part in case.arguments), case.files, case.names, case.odd)
        ended = world.run(case)
        came["tried"] += 1
        came["succeeded"] += case.odd and ended.status == 0
        wrong = ended.wrong(case)
        if wrong is None:
            came["right"] += 1
        else:
            came[wrong.partition(" ")[0] if wrong in ("traceback", "partial", "silent", "taken") else "other"] += 1
            files = {name: repr(content)[:200] for name, content in case.files.items()}
            shown.append({"wrong": wrong, "rise": list(case.arguments), "files": files, "names": case.names,
                          "status": ended.status, "lines": ended.lines[:4], "changed": ended.changed[:5]})  # fmt: skip
        if ended.changed:
            world.tidy()

    drawn(strategy, count, judge)
    return {**{name: came[name] for name in FIGURES},
            **({"succeeded": came["succeeded"]} if came["succeeded"] else {}),
            **({"wrong": shown[:_SHOWN]} if shown else {})}


@contextlib.contextmanager
def offline_world() -> Iterator[World]:
    """A world in a directory of its own, in which no hub is asked."""
    from huggingface_hub import constants

    asked, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    cache = os.environ.get("RISE_CACHE")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as wheels, socket.socket() as listening:
        os.environ["RISE_CACHE"] = wheels
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        try:
            world = World(Path(folder).resolve())
            world.port = listening.getsockname()[1]
            yield world
        finally:
            constants.HF_HUB_OFFLINE = asked
            os.environ.pop("RISE_CACHE")
            if cache is not None:
                os.environ["RISE_CACHE"] = cache


def run(scale: float = 1.0) -> dict[str, Any]:
    """2,000 bad inputs and 200 odd ones, by kind."""
    begun, figures = time.monotonic(), dict[str, Any]()
    with offline_world() as world:
        for kind, (strategy, count) in KINDS.items():
            figures[kind] = sweep(world, strategy(), max(1, round(scale * count)))
            print(f"{kind}: {json.dumps({name: figures[kind][name] for name in figures[kind] if name != 'wrong'})} "
                  f"{time.monotonic() - begun:.0f} s", file=sys.stderr)  # fmt: skip
        odd = sweep(world, oddities(), max(1, round(scale * ODD)))
    total = {name: sum(found[name] for found in figures.values()) for name in FIGURES}
    return {"bad inputs": total, "odd inputs": odd, "by kind": figures, "seconds": round(time.monotonic() - begun)}
