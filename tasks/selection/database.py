"""What the ledgers share: connections of one thread, files that are whole or absent, checked opening, digests."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.common.errors import InputError
from tasks.common.files import canonical_json, whole_file
from tasks.common.stage import Ref

if TYPE_CHECKING:
    import duckdb


@contextmanager
def connect(
    path: Path, *, read_only: bool, what: str = "a ledger", way_out: str = ""
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection of one thread: sums of floats then come out the same every time.

    Args:
        path: the database.
        read_only: False makes it where it is not.
        what: what it should be, and ``way_out`` what to do where it is not: for the error's line.

    Raises:
        InputError: another process holds it, or the file is no database.
    """
    import duckdb

    try:
        con = duckdb.connect(path, read_only=read_only, config={"threads": 1})
    except duckdb.Error as error:
        if "Could not set lock" in str(error):
            raise InputError("another process holds the ledger; close it and try again", file=path) from None
        _refuse_disk(error, path)
        raise InputError(f"is not {what}: DuckDB cannot read it{way_out}", file=path) from None
    try:
        yield con
    except duckdb.Error as error:
        _refuse_disk(error, path)
        if isinstance(error, duckdb.ProgrammingError) and not isinstance(error, duckdb.InvalidInputException):
            raise  # the query is at fault
        raise InputError(f"is damaged, or what it is made of is: {str(error).splitlines()[0]}{way_out}",
                         file=path) from None  # fmt: skip
    finally:
        con.close()


def _refuse_disk(error: duckdb.Error, path: Path) -> None:
    """Raise an InputError where the disk is at fault."""
    for code in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EFBIG):
        if os.strerror(code) in str(error):
            raise InputError(f"cannot be written ({os.strerror(code)}); what is whole is kept, the same command goes "
                             "on", file=path) from error  # fmt: skip


@contextmanager
def new_tables(path: Path, tables: Mapping[str, str]) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to empty tables (name → columns) beside ``path``; they take its place when the block ends."""
    with whole_file(path) as part:
        part.unlink(missing_ok=True)
        try:
            with connect(part, read_only=False) as con:
                make_tables(con, tables)
                yield con
                con.execute("CHECKPOINT")  # closing would do it, too, but says nothing where the disk is full
        finally:
            part.with_name(part.name + ".wal").unlink(missing_ok=True)


def make_tables(con: duckdb.DuckDBPyConnection, tables: Mapping[str, str]) -> None:
    """Make empty tables (name → columns)."""
    for table, columns in tables.items():
        con.execute(f"CREATE TABLE {table} ({columns})")


@contextmanager
def open_tables(
    path: Path, tables: Mapping[str, str], *, maker: str, what: str = "a ledger", way_out: str = ""
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A read-only connection to a database that has some tables.

    Args:
        path: the database.
        tables: what it must have.
        maker: the command that makes it.
        what: as of :func:`connect`, and ``way_out``.

    Raises:
        InputError: it is not there, another process holds it for writing, or the file is none.
    """
    if not path.is_file():
        raise InputError(f"no such ledger; `{maker}` makes it", file=path)
    with connect(path, read_only=True, what=what, way_out=way_out) as con:
        there = {*con.execute("SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal").fetchall()}
        if missing := set(tables) - {table for table, _ in there}:
            raise InputError(f"is not {what}: it has no table {min(missing)!r}", file=path)
        if lacking := {(table, name) for table in tables for name in columns_of(tables[table])} - there:
            raise InputError(f"is {what} of another version of this program (it has no column "
                             f"{'.'.join(min(lacking))}); use that, or another directory", file=path)  # fmt: skip
        yield con


def columns_of(columns: str) -> list[str]:
    """Names of the columns of a table."""
    return [column.split()[0] for column in columns.split(", ")]


def insert_stages(con: duckdb.DuckDBPyConnection, stages: Sequence[Ref]) -> None:
    """Fill the table ``stages``."""
    for ref in stages:
        con.execute("INSERT INTO stages VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    [ref.stage, ref.method, ref.seconds, ref.cached, ref.digest, ref.rows, ref.key, ref.path])


def digest_tables(
    con: duckdb.DuckDBPyConnection, tables: Mapping[str, str], undigested: frozenset[tuple[str, str]]
) -> str:
    """SHA-256 over all rows of some tables (name → columns), whatever their order in the file.

    Args:
        con: the database.
        tables: which tables.
        undigested: (table, column) pairs that are left out.
    """
    digest = hashlib.sha256()
    for table, columns in tables.items():
        kept = ", ".join(f'"{name}"' for name in columns_of(columns) if (table, name) not in undigested)
        digest.update(f"{table}({kept})\n".encode())
        con.execute(f"SELECT {kept} FROM {table} ORDER BY ALL")
        while chunk := con.fetchmany(10_000):
            for row in chunk:
                digest.update(f"{canonical_json(row)}\n".encode())
    return digest.hexdigest()
