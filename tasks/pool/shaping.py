"""Texts cut or joined into the units that become documents, so that length does not give the label away."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

Unit = Literal["passage", "sentence", "thread"]

_PIECE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[^\W\d_]+|\d|[^\w\s]|_|\n")

# A mark that ends a sentence, with closing quotes, before a blank and something that can begin one; not after an
# initial or an abbreviation that is mostly followed by a name or a number.
_SENTENCE_END = re.compile(
    r"(?<=[.!?…])(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bNo\.)(?<!\bvs\.)(?<!\bMrs\.)"
    r"(?<!\b[Hh]on\.)(?<!\be\.g\.)(?<!\bi\.e\.)[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])"
)


class Shaper:
    """Makes units of one source's texts: ``min_words`` to ``max_words`` words, at most ``max_pieces`` pieces.

    ``passage``: each text, from its beginning to the last sentence end within ``max_words``.
    ``sentence``: runs of consecutive sentences of a text, 1, 2, … ``join`` of them by turns.
    ``thread``: runs of consecutive texts, 1, 2, … ``join`` of them by turns, parted by a blank: a feed as a
    scraper finds it.

    Texts (``passage``, ``thread``) and sentences (``sentence``) that the source had before, but for case, are left
    out before they are joined.
    """

    def __init__(
        self, unit: Unit, *, join: int = 1, min_words: int = 1, max_words: int, max_pieces: int | None = None
    ) -> None:
        self._unit, self._join = unit, join
        self._min_words, self._max_words, self._max_pieces = min_words, max_words, max_pieces
        self._seen: set[str] = set()
        self.repeated = 0
        """Texts or sentences left out because the source had them before."""
        self.outside = 0
        """Units left out because they have too few words, or too many words or pieces."""

    def shape(self, texts: Iterable[str]) -> Iterator[tuple[str, int]]:
        """The units, each with the number of the text it is a piece of (of the run, where it is a thread)."""
        for unit, origin in self._units(texts):
            if self._fits(unit):
                yield unit, origin
            else:
                self.outside += 1

    def _fits(self, unit: str) -> bool:
        if not self._min_words <= words(unit) <= self._max_words:
            return False
        return self._max_pieces is None or pieces(unit) <= self._max_pieces

    def _units(self, texts: Iterable[str]) -> Iterator[tuple[str, int]]:
        if self._unit == "thread":
            for number, run in enumerate(_runs(self._new(texts), self._join)):
                yield " ".join(run), number
        elif self._unit == "passage":
            for number, text in enumerate(self._new(texts)):
                yield _cut(text, self._max_words), number
        else:
            for number, text in enumerate(texts):
                for run in _runs(self._new(sentences(text)), self._join, first=number):
                    yield " ".join(run), number

    def _new(self, items: Iterable[str]) -> Iterator[str]:
        for item in items:
            key = item.casefold()
            if key in self._seen:
                self.repeated += 1
            else:
                self._seen.add(key)
                yield item


def words(text: str) -> int:
    """Number of words: what blanks part."""
    return len(text.split())


def pieces(text: str) -> int:
    """Number of pieces: runs of lower-case letters with the capital before them, runs of capitals, single digits,
    marks and line ends. Within about a tenth what a tokenizer makes of English, web addresses included."""
    return len(_PIECE.findall(text))


def sentences(text: str) -> list[str]:
    """The sentences of ``text``; a line end always ends one."""
    return [sentence for line in text.split("\n") for sentence in _split(line) if sentence]


def _split(line: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(line):
        yield line[start : end.end()].strip()
        start = end.end()
    yield line[start:].strip()


def _cut(text: str, max_words: int) -> str:
    """``text`` up to the last sentence end within ``max_words``; whole where its first sentence alone has more."""
    if words(text) <= max_words:
        return text
    kept, count = list[str](), 0
    for sentence in sentences(text):
        count += words(sentence)
        if kept and count > max_words:
            break
        kept.append(sentence)
    return " ".join(kept)


def _runs(items: Iterable[str], join: int, first: int = 0) -> Iterator[list[str]]:
    """Consecutive items, in runs of 1, 2, … ``join`` by turns, beginning in the cycle at ``first``."""
    run, turn = list[str](), first
    for item in items:
        run.append(item)
        if len(run) == turn % join + 1:
            yield run
            run, turn = [], turn + 1
    if run:
        yield run
