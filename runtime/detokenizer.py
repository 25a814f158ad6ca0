"""Token ids to text as they come: whole UTF-8 characters only, and nothing that may turn out to be part of a stop
string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from pyinfer.runtime.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Feed ids to `push`, send on what it returns, and call `finish` at the end.

    All text together is `Tokenizer.decode(ids, skip_special, clean_spaces=False)`: spaces before punctuation stay,
    since they are what the model wrote. It ends before the first stop string to be completed, or after it with
    `include_stop`. `continues` says that the text follows a prompt directly, so that the space which starts a
    SentencePiece word is kept. Stops are not looked for in the first `min_tokens` tokens. Bytes that are not UTF-8
    become U+FFFD as soon as that is certain.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        *,
        continues: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._stops = [s for s in stop if s]
        self._include_stop = include_stop
        self._unchecked = min_tokens
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._drop_space = tokenizer.rules.add_space_prefix and not continues
        self._first = not continues
        self._held = ""
        self.stopped: str | None = None
        """The stop string that ended the text, if one did."""

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; empty after a stop."""
        if self.stopped is not None:
            return ""
        return self._emit(self._decode(self._bytes(token_id)), checked=self._count_down())

    def finish(self) -> str:
        """What was held back: there are no more tokens."""
        if self.stopped is not None:
            return ""
        text = self._emit(self._decode(b"", True), checked=self._unchecked <= 0)
        held, self._held = self._held, ""
        return text + held

    def _bytes(self, token_id: int) -> bytes:
        first, self._first = self._first, False
        if first and self._skip_special and self._tokenizer.add_bos and token_id == self._tokenizer.bos_id:
            self._drop_space = False
            return b""
        piece = self._tokenizer.shown_bytes(token_id, self._skip_special)
        drop, self._drop_space = self._drop_space, False
        return piece.removeprefix(b" ") if drop else piece

    def _count_down(self) -> bool:
        self._unchecked -= 1
        return self._unchecked < 0

    def _emit(self, text: str, checked: bool) -> str:
        if not self._stops or not checked:
            return text
        text = self._held + text
        end, size, stop = min(
            ((at + len(s), -len(s), s) for s in self._stops if (at := text.find(s)) >= 0), default=(-1, 0, "")
        )
        if end >= 0:
            self.stopped = stop
            self._held = ""
            return text[:end] if self._include_stop else text[: end + size]
        keep = len(text) - max(_overlap(text, s) for s in self._stops)
        self._held = text[keep:]
        return text[:keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with, short of the whole of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
