"""Documents from JSONL, JSON and Parquet: every row checked, every fault named by file, row and field.

The text is data and nothing else: it is decoded, measured and stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.common.errors import InputError
from tasks.common.files import whole_file
from tasks.pool.cleaning import lone_surrogate

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("doc_id", "text", "label", "source")
"""Columns of every documents table, all strings; label and source can be null."""
PROMPT_CHARS = "prompt_chars"
"""Further column of documents that are the completions of prompts: how many characters of a text are its prompt."""

MAX_CHARS = 1_000_000
_FIELDS = ("id", "text", "label", "source")
_PROMPT = "prompt"
_ID_LENGTH = 32
_Fault = Callable[..., InputError]


@dataclass(frozen=True)
class SkippedRow:
    """A row that was left out because ``on_bad_row`` is ``skip``."""

    file: str
    row: int
    field: str | None
    problem: str


@dataclass(frozen=True)
class DocumentsRead:
    """What a file held."""

    table: pa.Table
    """Columns :data:`COLUMNS`, in file order."""
    skipped: list[SkippedRow]


def content_id(text: str) -> str:
    """Identifier of a text: the first 32 hex digits of the SHA-256 of its UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH]


def read_documents(
    path: Path,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    max_chars: int = MAX_CHARS,
    labels: Sequence[str] | None = None,
    prompts: bool = False,
) -> DocumentsRead:
    """Read documents from ``.jsonl`` (one object a line), ``.json`` (an array of objects) or ``.parquet``.

    A row has ``text`` and may have ``id`` (string or integer; where absent the text's :func:`content_id`),
    ``label`` and ``source`` (strings). Other fields are not read. A row's number is its line in JSONL, its place in
    the array or table (from 1) elsewhere; blank lines are no rows.

    Args:
        path: the file; its extension says the format.
        on_bad_row: raise at the first bad row, or leave bad rows out and list them.
        max_chars: longest text taken, in characters.
        labels: the labels a row may carry; None takes any.
        prompts: rows may also have a ``prompt`` that their text completes. The document is then both, a blank between
            them where there is none, and the table has the column :data:`PROMPT_CHARS` as soon as one row has a prompt.

    Raises:
        InputError: the file is missing, unreadable or without a usable row; or a row is bad.
    """
    import pyarrow as pa

    rows = _rows(path, max_chars)
    check = _Checker(path, max_chars, None if labels is None else frozenset(labels), prompts)
    columns: dict[str, list[str | None]] = {name: [] for name in COLUMNS}
    chars: list[int] = []
    skipped: list[SkippedRow] = []
    for number, row in rows:
        try:
            values = check.row(number, row)
        except InputError as error:
            if on_bad_row == "error":
                raise
            skipped.append(SkippedRow(str(path), number, error.field, error.problem))
            continue
        for name, value in zip(COLUMNS, values[:-1], strict=True):
            columns[name].append(value)
        chars.append(values[-1])
    if not columns["text"]:
        raise InputError(
            f"no row can be used; all {len(skipped)} are bad, the first is row {skipped[0].row}: {skipped[0].problem}"
            if skipped else "holds no documents", file=path,
        )  # fmt: skip
    table = pa.table(columns, schema=_schema())
    if any(chars):
        table = table.append_column(PROMPT_CHARS, pa.array(chars, pa.int32()))
    return DocumentsRead(table, skipped)


def write_documents(path: Path, table: pa.Table) -> None:
    """Write a documents table as Parquet, whole or not at all; the same table gives the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    if PROMPT_CHARS in table.column_names:
        schema = schema.append(pa.field(PROMPT_CHARS, pa.int32()))
    with whole_file(path) as part:
        pq.write_table(table.select(schema.names).cast(schema), part, compression="zstd")


def read_table(path: Path) -> pa.Table:
    """Read what :func:`write_documents` wrote."""
    import pyarrow.parquet as pq

    return pq.read_table(path, schema=_schema())


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in COLUMNS])


@dataclass
class _Checker:
    """Turns raw rows into (doc_id, text, label, source, characters of prompt), remembering the ids it has seen."""

    path: Path
    max_chars: int
    labels: frozenset[str] | None
    prompts: bool
    seen: dict[str, int] = field(default_factory=dict)

    def row(self, number: int, row: Any) -> tuple[str, str, str | None, str | None, int]:
        def fault(problem: str, name: str | None = None) -> InputError:
            return InputError(problem, file=self.path, row=number, field=name)

        if isinstance(row, InputError):
            raise row
        if not isinstance(row, dict):
            raise fault(f"must be an object with a text, is {_kind(row)}")
        if row.get("text") is None:
            raise fault("is missing; every document needs a text", "text")
        strings = {name: _decoded(row.get(name), name, fault) for name in _FIELDS}
        text, given, label, source = strings["text"], strings["id"], strings["label"], strings["source"]
        if not isinstance(text, str):
            raise fault(f"must be a string, is {_kind(text)}", "text")
        if not text.strip():
            raise fault("is empty", "text")
        prompt = _decoded(row.get(_PROMPT), _PROMPT, fault) if self.prompts else None
        if prompt is not None and not isinstance(prompt, str):
            raise fault(f"must be a string, is {_kind(prompt)}", _PROMPT)
        if prompt:
            text = completed(prompt, text)
        if len(text) > self.max_chars:
            raise fault(f"has {len(text):,} characters, more than the {self.max_chars:,} allowed; cut it up", "text")
        for name, value in (("label", label), ("source", source)):
            if value is not None and not isinstance(value, str):
                raise fault(f"must be a string, is {_kind(value)}", name)
        if label is not None and self.labels is not None and label not in self.labels:
            raise fault(f"the label {label!r} is unknown; known are {', '.join(sorted(self.labels))}", "label")
        return self._identify(text, given, fault, number), text, label, source, len(prompt or "")

    def _identify(self, text: str, given: Any, fault: _Fault, number: int) -> str:
        if given is None:
            doc_id, twice = content_id(text), "the same text as in row {}; remove one, or give both an id"
        elif isinstance(given, bool) or not isinstance(given, str | int):
            raise fault(f"must be a string or an integer, is {_kind(given)}", "id")
        elif not str(given).strip():
            raise fault("is empty; leave it out to have one made from the text", "id")
        else:
            doc_id, twice = str(given), f"the id {str(given)!r} is that of row {{}} too"
        if doc_id in self.seen:
            raise fault(twice.format(self.seen[doc_id]), "text" if given is None else "id")
        self.seen[doc_id] = number
        return doc_id


def completed(prompt: str, completion: str) -> str:
    """A prompt and its completion, a blank between them where there is none."""
    return prompt + ("" if prompt[-1:].isspace() or completion[:1].isspace() else " ") + completion


def _decoded(value: Any, name: str, fault: _Fault) -> Any:
    """``value``, decoded where it is bytes (Parquet strings come as such), with no lone surrogate in it."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise fault(f"is not UTF-8 (byte {error.start + 1})", name) from None
    if isinstance(value, str) and (place := lone_surrogate(value)) is not None:
        raise fault(f"holds a lone surrogate (U+{ord(value[place]):04X}) at character {place + 1}", name)
    return value


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a string"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _rows(path: Path, max_chars: int) -> Iterator[tuple[int, Any]]:
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if path.suffix not in readers:
        raise InputError(f"the extension must be one of {', '.join(readers)}", file=path)
    if not path.exists():
        raise InputError("no such file", file=path)
    if not path.is_file():
        raise InputError("is not a file", file=path)
    try:
        yield from readers[path.suffix](path, max_chars)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", file=path) from None


def _jsonl(path: Path, max_chars: int) -> Iterator[tuple[int, Any]]:
    """Rows of a JSONL file, one line in memory at a time; a bad line comes as the InputError that describes it."""
    # Escaped as surrogate pairs a character takes up to 12 bytes; what is longer than that is too long in any case.
    limit = 12 * max_chars + 65_536
    with path.open("rb") as file:
        number = 0
        while line := file.readline(limit):
            number += 1
            if len(line) == limit and not line.endswith(b"\n"):
                while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
                    pass
                yield number, InputError(f"the line is longer than {limit:,} bytes", file=path, row=number)
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _loads(line, path, number)


def _loads(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return InputError(f"is not UTF-8 (byte {error.start + 1} of the line)", file=path, row=number)
    except json.JSONDecodeError as error:
        return InputError(f"is not JSON: {error.msg} at character {error.pos + 1}", file=path, row=number)
    except (ValueError, RecursionError) as error:
        return InputError(f"is not JSON that can be read: {error}", file=path, row=number)


def _json(path: Path, max_chars: int) -> Iterator[tuple[int, Any]]:
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 (byte {error.start + 1})", file=path) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"is not JSON: {error.msg}; with one object a line the file is to be named .jsonl",
            file=path, row=error.lineno,
        ) from None  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON that can be read: {error}", file=path) from None
    if not isinstance(value, list):
        raise InputError(f"must be an array of objects, is {_kind(value)}", file=path)
    yield from enumerate(value, start=1)


def _parquet(path: Path, max_chars: int) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            names = [name for name in (*_FIELDS, _PROMPT) if name in there]
            if "text" not in names:
                raise InputError("has no text column", file=path, field="text")
            if twice := [name for name in names if there.count(name) > 1]:
                raise InputError("two columns have this name", file=path, field=twice[0])
            number = 0
            for batch in file.iter_batches(batch_size=1_000, columns=names):
                columns = {name: _as_bytes(batch.column(name)).to_pylist() for name in names}
                for values in zip(*columns.values(), strict=True):
                    number += 1
                    yield number, dict(zip(columns, values, strict=True))
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: dates out of their range
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"is not Parquet that can be read: {first}", file=path) from None


def _as_bytes(column: pa.Array) -> pa.Array:
    """Strings as raw bytes, so that bytes which are not UTF-8 can be named by row; other types as they are."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if any(is_text(column.type) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        return column.cast(pa.large_binary())
    return column
