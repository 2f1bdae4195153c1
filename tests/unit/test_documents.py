"""Reading documents: every format, and every fault named by file, row and field."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.common.errors import InputError
from tasks.pool.documents import COLUMNS, content_id, read_documents, read_table, write_documents

GOOD = b'{"text": "a good row"}\n'


def jsonl(path: Path, *rows: Any) -> Path:
    file = path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def raw(path: Path, content: bytes, name: str = "data.jsonl") -> Path:
    file = path / name
    file.write_bytes(content)
    return file


def test_reads_every_field_in_file_order(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path, {"id": "b", "text": "zwei", "label": "junk", "source": "web"}, {"id": 7, "text": "sieben"},
        {"text": "ohne", "id": None, "other": [1]},
    )  # fmt: skip
    read = read_documents(file)
    assert read.table.column_names == list(COLUMNS)
    assert [tuple(row.values()) for row in read.table.to_pylist()] == [
        ("b", "zwei", "junk", "web"),
        ("7", "sieben", None, None),
        (hashlib.sha256(b"ohne").hexdigest()[:32], "ohne", None, None),
    ]
    assert read.skipped == []


def test_the_formats_agree(tmp_path: Path) -> None:
    rows = [{"text": "Grüße 🙂", "label": "control"}, {"text": "second", "label": None}]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.set_column(1, "label", table["label"].dictionary_encode()), tmp_path / "b.parquet")
    expected = read_documents(jsonl(tmp_path, *rows)).table
    raw(tmp_path, json.dumps(rows).encode(), "a.json")
    first, second = (json.dumps(row).encode() for row in rows)
    raw(tmp_path, b"\xef\xbb\xbf" + first + b"\r\n\r\n" + second, "b.jsonl")
    for name in ("a.parquet", "b.parquet", "a.json", "b.jsonl"):
        assert read_documents(tmp_path / name).table.equals(expected), name


def test_the_files_of_the_brain_rot_study(tmp_path: Path) -> None:
    file = raw(tmp_path, b'[{"text": "first"}, {"text": "second"}]', "junk.json")
    assert read_documents(file).table["text"].to_pylist() == ["first", "second"]


@pytest.mark.parametrize(
    ("line", "field", "words"),
    [
        (b'{"text": "broken', None, "not JSON"),
        (b'["text"]', None, "must be an object"),
        (b'"text"', None, "must be an object"),
        (b'{"id": "x"}', "text", "is missing"),
        (b'{"text": null}', "text", "is missing"),
        (b'{"text": 12}', "text", "must be a string, is a number"),
        (b'{"text": ["a"]}', "text", "must be a string, is a list"),
        (b'{"text": ""}', "text", "is empty"),
        (b'{"text": " \\n\\t\\u00a0"}', "text", "is empty"),
        (b'{"text": "half \\ud83d"}', "text", "lone surrogate (U+D83D) at character 6"),
        (b'{"text": "ok", "id": "\\udc00"}', "id", "lone surrogate"),
        (b'{"text": "ok", "id": ""}', "id", "is empty"),
        (b'{"text": "ok", "id": 1.5}', "id", "string or an integer"),
        (b'{"text": "ok", "id": true}', "id", "string or an integer"),
        (b'{"text": "ok", "label": 1}', "label", "must be a string"),
        (b'{"text": "ok", "source": {}}', "source", "must be a string"),
        (b'{"text": "ok", "label": "other"}', "label", "known are control, junk"),
        (b'{"text": "a good row"}', "text", "the same text as in row 1"),
        (b'{"text": "caf\xe9"}', None, "not UTF-8 (byte 14 of the line)"),
        (b'{"text": "' + b"x" * 101 + b'"}', "text", "101 characters, more than the 100 allowed"),
        (b"[" * 100_000, None, "more than|longer than|not JSON"),
        (b'{"text": 1' + b"0" * 5_000 + b"}", None, "not JSON"),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path: Path, line: bytes, field: str | None, words: str) -> None:
    file = raw(tmp_path, GOOD + b"\n" + line + b'\n{"text": "and another"}\n')
    with pytest.raises(InputError) as caught:
        read_documents(file, max_chars=100, labels=["junk", "control"])
    error = caught.value
    assert (error.file, error.row, error.field) == (str(file), 3, field)
    assert any(word in error.problem for word in words.split("|"))
    assert "\n" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)

    read = read_documents(file, max_chars=100, labels=["junk", "control"], on_bad_row="skip")
    assert read.table["text"].to_pylist() == ["a good row", "and another"]
    (skipped,) = read.skipped
    assert (skipped.file, skipped.row, skipped.field, skipped.problem) == (str(file), 3, field, error.problem)


def test_duplicate_ids_name_both_rows(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"id": "a", "text": "1"}, {"id": "b", "text": "2"}, {"id": "a", "text": "3"})
    with pytest.raises(InputError, match=r"row 3, field id: the id 'a' is that of row 1 too"):
        read_documents(file)
    assert read_documents(file, on_bad_row="skip").table["doc_id"].to_pylist() == ["a", "b"]


def test_the_same_text_is_fine_under_two_ids(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"id": "a", "text": "same"}, {"id": "b", "text": "same"})
    assert read_documents(file).table.num_rows == 2


def test_a_document_of_ten_megabytes(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"text": "short"}, {"text": "x" * 10_000_000}, {"text": "y" * 50_000_000}, {"text": "end"})
    with pytest.raises(InputError, match=r"row 2, field text: has 10,000,000 characters, more than the 1,000,000"):
        read_documents(file)
    read = read_documents(file, on_bad_row="skip")
    assert read.table["text"].to_pylist() == ["short", "end"]
    assert [row.row for row in read.skipped] == [2, 3]
    assert "longer than" in read.skipped[1].problem  # not even parsed


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "holds no documents"),
        ("a.jsonl", b"\n \n", "holds no documents"),
        ("a.json", b"[]", "holds no documents"),
        ("a.json", b'{"text": "x"}', "must be an array"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}\n', "named .jsonl"),
        ("a.json", b'["\xff"]', "not UTF-8"),
        ("a.json", b"[" * 100_000, "not JSON that can be read"),
        ("a.parquet", b"PAR1 but no more", "not Parquet"),
        ("a.csv", b"text\nx\n", "extension must be one of .jsonl, .json, .parquet"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, words: str, on_bad_row: Any) -> None:
    with pytest.raises(InputError, match=words.replace(".", r"\.")) as caught:
        read_documents(raw(tmp_path, content, name), on_bad_row=on_bad_row)
    assert caught.value.file == str(tmp_path / name)


def test_missing_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_documents(tmp_path / "missing.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="is not a file"):
        read_documents(tmp_path / "folder.json")


def test_all_rows_bad(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"all 2 are bad, the first is row 1: is missing"):
        read_documents(jsonl(tmp_path, {}, {"text": ""}), on_bad_row="skip")


def test_parquet_faults(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"]}), file)
    with pytest.raises(InputError, match="field text: has no text column"):
        read_documents(file)
    pq.write_table(pa.table({"text": [1, 2]}), file)
    with pytest.raises(InputError, match="row 1, field text: must be a string, is a number"):
        read_documents(file)
    pq.write_table(pa.table({"text": ["a", None]}), file)
    with pytest.raises(InputError, match="row 2, field text: is missing"):
        read_documents(file)
    broken = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), file)
    with pytest.raises(InputError, match=r"row 2, field text: is not UTF-8 \(byte 4\)"):
        read_documents(file)


def test_write_and_read_again(tmp_path: Path) -> None:
    table = read_documents(jsonl(tmp_path, {"text": "a"}, {"text": "b", "label": "junk"})).table
    for name in ("1.parquet", "2.parquet"):
        write_documents(tmp_path / name, table)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()
    assert read_table(tmp_path / "1.parquet").equals(table)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1,
                unique=True))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_text_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    table = read_documents(jsonl(tmp_path_factory.mktemp("any"), *({"text": text} for text in texts))).table
    assert table["text"].to_pylist() == texts
    assert table["doc_id"].to_pylist() == [content_id(text) for text in texts]
