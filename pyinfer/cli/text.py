"""Text from files, made fit for a terminal: no escape sequence of a model's metadata may reach it raw."""

from __future__ import annotations

import unicodedata

# Besides control characters (Cc): format characters that reorder or hide text (Cf), lone surrogates, line separators.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def safe(text: str, *, keep_newlines: bool = False) -> str:
    """`text` with every control, bidirectional and other invisible character written as its escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_safe_char(c, keep_newlines) for c in text)


def _safe_char(char: str, keep_newlines: bool) -> str:
    if keep_newlines and char in "\n\t":
        return char
    if unicodedata.category(char) not in _UNSAFE:
        return char
    return char.encode("unicode_escape").decode("ascii")


def one_line(text: str) -> str:
    """`text` on one line and safe: for errors."""
    return safe(" ".join(text.split()))
