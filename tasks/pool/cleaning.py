"""What every document goes through before it is counted: entities, control characters, Unicode form, blanks."""

from __future__ import annotations

import html
import re
import unicodedata

# C0 and C1 controls that are no blanks; the byte order mark, zero-width space and soft hyphen, which nobody sees.
_INVISIBLE = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\u200b\xad]")


def clean(text: str) -> str:
    """``text`` with HTML entities unescaped (once), invisible characters dropped, in NFC, and blanks folded.

    A run of blanks becomes one space, a run with a line break in it one line feed; none is left at either end.
    The result can be empty.

    Raises:
        ValueError: the text holds a lone surrogate, which no UTF-8 file can hold.
    """
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", html.unescape(text)))
    lines = (" ".join(line.split()) for line in text.splitlines())
    text = "\n".join(line for line in lines if line)
    if (place := lone_surrogate(text)) is not None:
        raise ValueError(f"a lone surrogate (U+{ord(text[place]):04X}) at character {place + 1}")
    return text


def lone_surrogate(text: str) -> int | None:
    """Position of the first lone surrogate in ``text``, or None where it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
