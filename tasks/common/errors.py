"""The one error a user is meant to read, and text of others made fit for a terminal."""

from __future__ import annotations

from pathlib import Path

LONGEST = 1_000
"""Characters of an error's line."""


def printable(text: str) -> str:
    """A text on one line, with whatever a terminal would act on spelled out."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def one_line(text: str) -> str:
    """A text as an error's line: blanks folded, :func:`printable`, the middle of a long one left out."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


class InputError(Exception):
    """Something the user gave cannot be used. The command line prints it as one line and exits with status 2.

    The line names the file, the row (1-based, as an editor counts lines) and the field where they are known, then
    what is wrong and the way out.
    """

    def __init__(
        self, problem: str, *, file: str | Path | None = None, row: int | None = None, field: str | None = None
    ) -> None:
        self.problem = problem
        self.file = None if file is None else str(file)
        self.row = row
        self.field = field
        super().__init__(problem, self.file, row, field)

    def __str__(self) -> str:
        place = [part for part in (
            self.file,
            None if self.row is None else f"row {self.row}",
            None if self.field is None else f"field {self.field}",
        ) if part]
        return one_line(f"{', '.join(place)}: {self.problem}" if place else self.problem)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling (Prefect, multiprocessing) without this.
        return (_rebuild, (self.problem, self.file, self.row, self.field))


class DamagedError(InputError, ValueError):
    """A file is not what was written. Who can make it again catches it as a ValueError."""


def _rebuild(problem: str, file: str | None, row: int | None, field: str | None) -> InputError:
    return InputError(problem, file=file, row=row, field=field)
