"""The one error a user is meant to read."""

from __future__ import annotations

from pathlib import Path


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
        line = f"{', '.join(place)}: {self.problem}" if place else self.problem
        return " ".join(line.split())

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling (Prefect, multiprocessing) without this.
        return (_rebuild, (self.problem, self.file, self.row, self.field))


def _rebuild(problem: str, file: str | None, row: int | None, field: str | None) -> InputError:
    return InputError(problem, file=file, row=row, field=field)
