"""/tokenize and /detokenize, in llama-server's forms."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from pyinfer.server.decoding import read_request
from pyinfer.server.errors import json_response
from pyinfer.server.reply import service_of
from pyinfer.server.schemas import DetokenizeRequest, TokenizeRequest

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    tokenizer = service_of(request).model().tokenizer
    body = await read_request(request, TokenizeRequest)
    ids = await asyncio.to_thread(tokenizer.encode, body.content, body.add_special, body.parse_special)
    tokens: list[Any] = list(ids)
    if body.with_pieces:
        tokens = [{"id": token, "piece": _piece(tokenizer.token_bytes(token))} for token in ids]
    return json_response(msgspec.json.encode({"tokens": tokens}))


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    tokenizer = service_of(request).model().tokenizer
    body = await read_request(request, DetokenizeRequest)
    text = await asyncio.to_thread(tokenizer.decode, body.tokens, False)
    return json_response(msgspec.json.encode({"content": text}))


def _piece(data: bytes) -> str | list[int]:
    """Text, or the bytes where a token is no UTF-8 by itself."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return list(data)
