"""Files that lie elsewhere: object stores and all else that fsspec reads by a URL."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tasks.common.errors import InputError


@contextmanager
def at_hand(file: Path | str) -> Iterator[Path]:
    """A file of this machine as it is, or a copy of one that lies elsewhere, for as long as it is needed.

    Args:
        file: a path, or a URL as fsspec takes it: ``s3://BUCKET/FILE``, ``gs://…``, ``https://…``; the store's own
            package (s3fs, gcsfs, …) has to be installed.

    Raises:
        InputError: it cannot be had; or the block's, which then names the URL in place of the copy.
    """
    if isinstance(file, Path):
        yield file
        return
    import fsspec

    with tempfile.TemporaryDirectory(prefix="rise-") as folder:
        try:
            store, place = fsspec.url_to_fs(file)
            copy = Path(folder) / PurePosixPath(place).name
            store.get_file(place, str(copy))
        except FileNotFoundError:
            raise InputError("no such file", file=file) from None
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"cannot be read ({error})", file=file) from None
        if not copy.is_file():
            raise InputError("is not a file", file=file)
        try:
            yield copy
        except InputError as error:
            if error.file != str(copy):
                raise
            raise InputError(error.problem, file=file, row=error.row, field=error.field) from error.__cause__
