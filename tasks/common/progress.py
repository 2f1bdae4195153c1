"""One progress bar for everything that takes longer than a few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

Report = Callable[[float], None]
"""Called with the share done, 0 to 1 (a :class:`Share`); a Prefect face turns it into a progress artifact."""


class Share(float):
    """A share done, and the words for it: amounts, how many a second, the time left."""

    words = ""


class Progress:
    """A bar on stderr, and a report of the share done at most once in two per cent.

    Args:
        label: what is being done, in a word or two.
        total: amount of work in ``unit``.
        unit: what is counted: tokens, documents, steps.
        done: amount finished before, by an earlier call that was interrupted.
        report: also told the share done.
    """

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, report: Report | None = None) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, initial=done, desc=label, unit=f" {unit}", file=sys.stderr, mininterval=0.5,
            leave=False, dynamic_ncols=True, unit_scale=total >= 10_000,
        )
        self._report, self._unit, self._total = report, unit, total
        self._begun = time.monotonic(), done
        self._told = -1.0

    def __enter__(self) -> Progress:
        try:
            self._tell()
        except BaseException:
            self._bar.close()  # so that an error has a line of its own
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self._tell()
        finally:
            self._bar.close()

    def add(self, amount: int) -> None:
        """Count ``amount`` more units as done."""
        self._bar.update(amount)
        self._tell()

    def _tell(self) -> None:
        share = self._bar.n / self._bar.total if self._bar.total else 1.0
        if self._report is not None and (share - self._told >= 0.02 or share >= 1.0 > self._told):
            self._told = share
            told = Share(min(share, 1.0))
            told.words = self._words()
            self._report(told)

    def _words(self) -> str:
        """``4,096 of 9,034 tokens, 212 a second, 23 s left``: the rate is that of this call alone."""
        begun, before = self._begun
        words = f"{self._bar.n:,} of {self._total:,} {self._unit}"
        rate = (self._bar.n - before) / max(time.monotonic() - begun, 1e-9)
        if rate <= 0:
            return words
        words += f", {rate:,.{0 if rate >= 10 else 1}f} a second"
        left = (self._total - self._bar.n) / rate
        return words + (f", {time_left(left)} left" if left > 0 else "")


def time_left(seconds: float) -> str:
    """A time as one number: ``41 s``, ``12 min``, ``5.2 h``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
