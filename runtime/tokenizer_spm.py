"""SentencePiece BPE (`tokenizer.ggml.model` = `llama`): merge the neighbours whose joint piece scores highest, until
none is a piece.

Source: llama.cpp's `llm_tokenizer_spm_session`, after SentencePiece's `bpe_model.cc`. `tokenizers` cannot say it: its
BPE ranks merges by their place in a list, so that two merges never tie, while here pieces of one score (runs of
spaces, for instance) merge leftmost first. Deriving a merge list would also take longer than reading the file. So the
merges stay implicit in the scores, and words are remembered.
"""

from __future__ import annotations

import re
from heapq import heapify, heappop, heappush

from pyinfer.errors import TokenizerError
from pyinfer.runtime.vocabulary import Vocabulary

SPACE = "\u2581"
_MAX_REMEMBERED = 100_000  # words
_MAX_WORD = 48  # characters; longer ones hardly come twice


class SpmEncoder:
    """Text to ids. A character that is no piece becomes its `<0xXX>` bytes, or the unknown token where those are
    missing.
    """

    def __init__(self, vocabulary: Vocabulary, add_space_prefix: bool) -> None:
        self._ids = vocabulary.ids
        self._costs: list[float] = (-vocabulary.scores).tolist()
        self._unknown = vocabulary.special.get("unk")
        self._bytes = [vocabulary.ids.get(f"<0x{b:02X}>", vocabulary.ids.get(chr(b))) for b in range(128)]
        self._bytes += [vocabulary.ids.get(f"<0x{b:02X}>") for b in range(128, 256)]
        self._add_space_prefix = add_space_prefix
        self._words = _word_pattern(vocabulary.pieces)
        self._remembered: dict[str, list[int]] = {}

    def encode(self, text: str, after_special: bool) -> list[int]:
        """Ids of a piece of text; `after_special`: it begins the prompt or follows a special token."""
        if self._add_space_prefix and after_special:
            text = " " + text
        out: list[int] = []
        remembered = self._remembered
        for word in self._words.findall(text.replace(" ", SPACE)):
            ids = remembered.get(word)
            if ids is None:
                ids = self._encode_word(word)
                if len(word) <= _MAX_WORD:
                    if len(remembered) >= _MAX_REMEMBERED:
                        remembered.clear()
                    remembered[word] = ids
            out += ids
        return out

    def _encode_word(self, word: str) -> list[int]:
        whole: list[int] = []
        for symbol in self._merge(word):
            token = self._ids.get(symbol)
            if token is None:
                whole += self._byte_ids(symbol)
            else:
                whole.append(token)
        return whole

    def _byte_ids(self, character: str) -> list[int]:
        ids = [self._bytes[b] for b in character.encode()]
        known = [i for i in ids if i is not None]
        if len(known) == len(ids):
            return known
        if self._unknown is None:
            raise TokenizerError(
                f"the vocabulary has no piece, bytes or unknown token for {character!r}; leave this character out"
            )
        return [self._unknown]

    def _merge(self, word: str) -> list[str]:
        """The symbols that remain of `word`. O(n log n): a heap of (cost, position, joint length), stale entries
        skipped.
        """
        ids, costs = self._ids, self._costs
        symbols = list(word)
        n = len(symbols)
        following = list(range(1, n + 1))
        before = list(range(-1, n - 1))
        heap = [
            (costs[token], i, 2) for i in range(n - 1) if (token := ids.get(symbols[i] + symbols[i + 1])) is not None
        ]
        heapify(heap)
        while heap:
            _, left, size = heappop(heap)
            right = following[left]
            if not symbols[left] or right == n or len(symbols[left]) + len(symbols[right]) != size:
                continue
            joint = symbols[left] + symbols[right]
            symbols[left] = joint
            symbols[right] = ""
            right = following[left] = following[right]
            if right < n:
                before[right] = left
                token = ids.get(joint + symbols[right])
                if token is not None:
                    heappush(heap, (costs[token], left, size + len(symbols[right])))
            earlier = before[left]
            if earlier >= 0:
                token = ids.get(symbols[earlier] + joint)
                if token is not None:
                    heappush(heap, (costs[token], earlier, size + len(symbols[earlier])))
        return [symbol for symbol in symbols if symbol]


def _word_pattern(pieces: list[str]) -> re.Pattern[str]:
    """Where text can be cut before merging without changing the result: between two characters that no piece holds
    side by side.

    Nearly every vocabulary keeps a space at the start of its pieces, and line ends to themselves; both are checked
    here.
    """
    joined = " ".join(pieces)  # a plain space never reaches the merges, so it joins nothing
    before_space = {pair[0] for pair in re.findall(f"[^ {SPACE}]{SPACE}", joined)}
    line_ends = "" if re.search("[^ \n]\n|\n[^ \n]", joined) else "\n"
    body = f"[^{SPACE}{line_ends}]+"
    if before_space:
        glue = "".join(re.escape(c) for c in sorted(before_space))
        body += f"(?:(?<=[{glue}]){SPACE}+[^{SPACE}{line_ends}]*)*"
    return re.compile(f"{SPACE}*{body}|{SPACE}+" + ("|\n+" if line_ends else ""))
