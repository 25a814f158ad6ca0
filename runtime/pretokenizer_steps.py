"""The steps of pre-tokenizers that no regular expression does, or none in linear time. Each takes text and returns
its parts.
"""

from __future__ import annotations

import re
from itertools import pairwise

# Unicode's White_Space, as the inside of a character class.
WHITE_SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"


def _number_runs(text: str) -> list[tuple[int, int]]:
    """(start, end) of every run of `\\p{N}`."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    between = Split(Regex(r"\p{N}+"), "removed").pre_tokenize_str(text)
    runs, last = [], 0
    for _, (start, end) in between:
        if start > last:
            runs.append((last, start))
        last = end
    if last < len(text):
        runs.append((last, len(text)))
    return runs


def _cut(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *cuts, len(text)]
    return [text[a:b] for a, b in pairwise(edges) if a < b]


def digits_by_three(text: str) -> list[str]:
    """Groups of three digits counted from the right; the first group keeps the text before it, as in llama.cpp."""
    cuts: list[int] = []
    for start, end in _number_runs(text):
        first = start + (end - start) % 3
        cuts.extend(range(first if first > start else start + 3, end + 1, 3))
    return _cut(text, cuts)


def superbpe_numbers(text: str) -> list[str]:
    """Every run of numbers by itself, its ASCII digits in groups of three counted from the right."""
    cuts: list[int] = []
    for start, end in _number_runs(text):
        cuts.append(start)
        for digits in re.finditer("[0-9]+", text[start:end]):
            size = digits.end() - digits.start()
            cuts.extend(range(start + digits.start() + size % 3, start + digits.end() - 2, 3))
        cuts.append(end)
    return _cut(text, cuts)


def lines(text: str) -> list[str]:
    return re.findall(r"[^\n]+|\n+", text)


def words(text: str) -> list[str]:
    """Words without the white space between them, which is lost."""
    return re.findall(rf"[^{WHITE_SPACE}]+", text)
