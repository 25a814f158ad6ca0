"""Log-probabilities in the forms of OpenAI's two APIs, and prompt log-probabilities in vLLM's."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyinfer.runtime.outputs import Logprob, TokenLogprobs
from pyinfer.server.generation import Delta

if TYPE_CHECKING:
    from pyinfer.runtime.tokenizer import Tokenizer

_LOWEST = -9999.0  # what OpenAI writes for "very unlikely"; JSON has no -inf


def shown_token(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is no UTF-8 by itself as `bytes:\\xe2\\x80`, as OpenAI writes it."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _value(entry: Logprob) -> float:
    return max(entry.logprob, _LOWEST)


def _top(entries: TokenLogprobs, count: int) -> list[tuple[int, Logprob]]:
    """The `count` most likely ones, best first; the chosen token counts only if it is among them."""
    ranked = sorted(entries.items(), key=lambda item: item[1].rank)
    return [item for item in ranked if item[1].rank <= count][:count]


def chat_logprobs(tokenizer: Tokenizer, delta: Delta, count: int) -> dict[str, Any]:
    """`logprobs` of a chat choice or chunk."""

    def entry(token: int, value: Logprob) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": shown_token(tokenizer, token), "logprob": _value(value), "bytes": list(data)}

    content = [
        {**entry(token, entries[token]), "top_logprobs": [entry(*item) for item in _top(entries, count)]}
        for token, entries in zip(delta.token_ids, delta.logprobs or [], strict=True)
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Makes `logprobs` of one text completion, part by part; remembers where in the text the next token starts."""

    def __init__(self, tokenizer: Tokenizer, count: int, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def part(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """The entries of the next tokens; None is a token with nothing before it. The top holds the chosen one too."""
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entries in zip(tokens, logprobs, strict=True):
            result["tokens"].append(shown_token(self._tokenizer, token))
            result["token_logprobs"].append(None if entries is None else _value(entries[token]))
            if self._count:
                result["top_logprobs"].append(None if entries is None else self._named(entries))
            result["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.shown_bytes(token, self._skip_special)))
        return {**result, "top_logprobs": result["top_logprobs"] if self._count else None}

    def _named(self, entries: TokenLogprobs) -> dict[str, float]:
        named: dict[str, float] = {}
        for token, value in sorted(entries.items(), key=lambda item: item[1].rank):
            named.setdefault(shown_token(self._tokenizer, token), _value(value))
        return named


def prompt_logprobs_json(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs | None]
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: None for the first token, then token id -> logprob, rank and text."""
    return [
        None
        if entries is None
        else {
            str(token): {
                "logprob": _value(value),
                "rank": value.rank,
                "decoded_token": shown_token(tokenizer, token),
            }
            for token, value in entries.items()
        }
        for entries in logprobs
    ]
