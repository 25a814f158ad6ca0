"""Request body -> schema, with an error text that names the field, its value and what it must be."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, TypeVar, get_args

import msgspec
from starlette.requests import Request

from pyinfer.errors import RequestError
from pyinfer.server.errors import BodyTooLargeError
from pyinfer.server.schemas import Role

MAX_BODY = 64 << 20  # bytes; a context of a million tokens fits many times
T = TypeVar("T", bound=msgspec.Struct)

_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>.*?)`(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>.*?)`(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_KINDS = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
_WRONG = re.compile(r"(?P<text>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)


async def read_request(request: Request, schema: type[T]) -> T:
    """The decoded body; raises `RequestError` or `BodyTooLargeError`."""
    body = await read_body(request)
    return decode(body, schema)


async def read_body(request: Request) -> bytes:
    """The whole body, at most `MAX_BODY` bytes."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > MAX_BODY:
        raise BodyTooLargeError(f"the body has {declared} bytes; at most {MAX_BODY} are allowed")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise BodyTooLargeError(f"the body has more than {MAX_BODY} bytes, the most that is allowed")
        parts.append(part)
    return b"".join(parts)


def decode(body: bytes, schema: type[T]) -> T:
    """`body` as `schema`."""
    try:
        return msgspec.json.decode(body, type=schema)
    except msgspec.ValidationError as error:
        raise _explained(str(error), body, schema) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None


def _explained(text: str, body: bytes, schema: type[msgspec.Struct]) -> RequestError:
    if match := _UNKNOWN.match(text):
        field, path = match["field"], _dotted(match["path"])
        name = f"{path}.{field}" if path else field
        close = [] if path else difflib.get_close_matches(field, schema.__struct_encode_fields__, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "; leave it out"
        return RequestError(f"{name!r} is not a field that this endpoint knows{hint}", param=name, code="unknown_field")
    if match := _MISSING.match(text):
        path = _dotted(match["path"])
        name = f"{path}.{match['field']}" if path else match["field"]
        return RequestError(f"{name!r} is missing; it is required", param=name, code="missing_field")
    match = _WRONG.match(text)
    assert match is not None  # the pattern takes every text
    name = _dotted(match["path"]) or "body"
    return RequestError(
        f"{name} is {_shown(body, name)}; it must be {_expected(match['text'], name)}", param=name, code="invalid_type"
    )


def _expected(text: str, name: str) -> str:
    """ "a number or null" for msgspec's "Expected `float | null`, got `str`"."""
    if "length >= 1" in text:
        return "a list of at least one entry"
    kinds = re.match(r"Expected `(.*?)`(?! *\|)", text)
    if kinds is not None:
        return " or ".join(_KINDS.get(kind.strip(), kind.strip()) for kind in kinds[1].split("|"))
    if name.endswith(".role"):
        return f"one of {', '.join(get_args(Role))}"
    return "something else: " + text[:1].lower() + text[1:].replace("`", "")


def _dotted(path: str | None) -> str:
    """`messages[0].role` for msgspec's `.messages[0].role`."""
    return (path or "").lstrip(".")


def _shown(body: bytes, name: str) -> str:
    """The value at a path such as `messages[0].role`, shortened."""
    try:
        value: Any = json.loads(body)
        for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", name):
            if name != "body":
                value = value[int(index)] if index else value[key]
    except (ValueError, LookupError, TypeError, RecursionError):
        return "of the wrong type"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
