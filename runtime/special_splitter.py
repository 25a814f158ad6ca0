"""Cuts text at special tokens, before anything else looks at it.

The rule is llama.cpp's (`tokenizer_st_partition`): the longest token takes all its occurrences first, then the next
longest in what is left, and so on. That is not the leftmost-longest rule of most libraries, and differs where special
tokens overlap.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_PREFIX = 4
_SPACE = " \t\n\v\f\r"


@dataclass(frozen=True)
class SpecialToken:
    id: int
    text: str
    control: bool  # parsed only where the caller allows it
    strip_left: bool = False  # takes the white space before it along
    strip_right: bool = False


class SpecialSplitter:
    """Splits with all special tokens (`parse_special`) or only those that any text may spell."""

    def __init__(self, tokens: Iterable[SpecialToken]) -> None:
        ordered = sorted(tokens, key=lambda token: -len(token.text.encode("utf-8", "surrogateescape")))
        self._all = _Index(ordered)
        self._open = _Index([token for token in ordered if not token.control])

    def split(self, text: str, parse_special: bool) -> list[str | int]:
        """Text pieces (never empty) and token ids, in order."""
        if not text:
            return []
        index = self._all if parse_special else self._open
        found = index.candidates(text)
        if not found:
            return [text]
        marks = _occurrences(text, found, index.filler)
        parts: list[str | int] = []
        at = 0
        for start, end, token_id in marks:
            if at < start:
                parts.append(text[at:start])
            parts.append(token_id)
            at = end
        if at < len(text):
            parts.append(text[at:])
        return parts


class _Index:
    """Finds quickly which tokens a text may hold, by their first characters: there can be thousands of them."""

    def __init__(self, ordered: list[SpecialToken]) -> None:
        self.filler = "\0" if all("\0" not in token.text for token in ordered) else "\uffff"
        self._groups: dict[str, dict[str, tuple[int, SpecialToken]]] = {}
        for rank, token in enumerate(ordered):
            self._groups.setdefault(token.text[:_PREFIX], {})[token.text] = (rank, token)
        self._lengths = {prefix: sorted({len(text) for text in group}) for prefix, group in self._groups.items()}

    def candidates(self, text: str) -> list[SpecialToken]:
        found: dict[int, SpecialToken] = {}
        for prefix, group in self._groups.items():
            at = text.find(prefix)
            if at < 0:
                continue
            lengths = self._lengths[prefix]
            if len(group) == 1 or text.count(prefix) * len(lengths) > len(group):
                found.update(group.values())
                continue
            while at >= 0:
                found.update(group[part] for n in lengths if (part := text[at : at + n]) in group)
                at = text.find(prefix, at + 1)
        return [found[rank] for rank in sorted(found)]


def _occurrences(text: str, ordered: list[SpecialToken], filler: str) -> list[tuple[int, int, int]]:
    """(start, end, id) in text order; `end - start` includes white space that the token takes along."""
    marks: list[tuple[int, int, int]] = []
    free = text  # what is taken is overwritten with `filler`, which no token holds
    for token in ordered:
        at = free.find(token.text)
        if at < 0:
            continue
        kept: list[str] = []
        done = 0
        while at >= 0:
            start, end = at, at + len(token.text)
            if token.strip_left:
                start = done + len(free[done:start].rstrip(_SPACE))
            if token.strip_right:
                while end < len(free) and free[end] in _SPACE:
                    end += 1
            marks.append((start, end, token.id))
            kept.append(free[done:start])
            kept.append(filler * (end - start))
            done = end
            at = free.find(token.text, end)
        kept.append(free[done:])
        free = "".join(kept)
    marks.sort()
    return marks
