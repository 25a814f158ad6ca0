"""Who counts tokens for the workloads: a tokenizer in this process, or the server itself."""

from __future__ import annotations

import asyncio
import random
from typing import Any, Protocol

import msgspec

from pyinfer.errors import ConfigError
from pyinfer.loadgen.http_client import HttpClient, StatusError
from pyinfer.loadgen.http_reader import HttpError

_SECONDS = 30.0  # for one text


class Tokenizer(Protocol):
    """What a workload needs of a vocabulary."""

    async def encode(self, text: str, add_special: bool = True) -> list[int]: ...

    async def decode(self, ids: list[int]) -> str: ...


class LocalTokenizer:
    """One of `pyinfer.runtime.tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    async def encode(self, text: str, add_special: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special=add_special)
        return ids

    async def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text


class ServerTokenizer:
    """The server's own /tokenize and /detokenize, which pyinfer and llama-server have in the same form."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    async def encode(self, text: str, add_special: bool = True) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": False}
        ids: list[int] = await self._post("/tokenize", body, "tokens", list[int])
        return ids

    async def decode(self, ids: list[int]) -> str:
        text: str = await self._post("/detokenize", {"tokens": ids}, "content", str)
        return text

    async def _post(self, path: str, body: dict[str, Any], key: str, kind: Any) -> Any:
        try:
            async with asyncio.timeout(_SECONDS):
                reply = await self._client.request("POST", path, msgspec.json.encode(body))
            return msgspec.convert(msgspec.json.decode(reply)[key], kind)
        except (StatusError, HttpError, OSError, msgspec.MsgspecError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._client.base_url}{path} does not count tokens ({error or type(error).__name__}); "
                "name a model with the server's vocabulary in --tokenizer",
                param="tokenizer",
            ) from error


async def ordinary_ids(tokenizer: Tokenizer, seed: int) -> list[int]:
    """Some hundred ids that ordinary text is made of, so none of them is special or ends an answer."""
    rng = random.Random(f"ordinary ids {seed}")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ("".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(1500))
    return sorted(set(await tokenizer.encode(" " + " ".join(words), add_special=False)))
