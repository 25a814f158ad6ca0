"""Every error as OpenAI's `{"error": {"message", "type", "param", "code"}}`, and the status that goes with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pyinfer.errors import OverloadedError, PyinferError

if TYPE_CHECKING:
    from starlette.applications import Starlette

logger = logging.getLogger("pyinfer.server")


class BodyTooLargeError(PyinferError):
    """A body over the limit."""

    http_status = 413


class LoadingError(PyinferError):
    """The model is not ready yet."""

    http_status = 503
    error_type = "server_error"


class AuthenticationError(PyinferError):
    """No API key, or a wrong one."""

    http_status = 401
    error_type = "authentication_error"


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def body_of(error: Exception) -> tuple[int, bytes]:
    """Status and body for any exception; one that is ours to blame is logged and kept from the client."""
    if isinstance(error, PyinferError):
        return error.http_status, error_body(str(error), error.error_type, error.param, error.code)
    logger.error("request failed", exc_info=error)
    text = f"internal error: {type(error).__name__}; the server's log has the details"
    return 500, error_body(text, "server_error", code="internal_error")


def error_response(error: Exception) -> Response:
    status, body = body_of(error)
    headers: dict[str, str] = {}
    if status == 503:
        headers["Retry-After"] = "1"
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(error.retry_after)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(body, status, headers)


def json_response(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


async def _on_pyinfer_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    route = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        text, code = f"there is no route {route}; the API is under /v1", "not_found"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow") or (error.headers or {}).get("allow") or "another method"
        text, code = f"{route} is not allowed; use {allowed}", "method_not_allowed"
    else:
        text, code = str(error.detail), None
    return json_response(error_body(text, "invalid_request_error", code=code), error.status_code, error.headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is nginx's word for it in a log."""
    return Response(status_code=499)


def install_handlers(app: Starlette) -> None:
    app.add_exception_handler(PyinferError, _on_pyinfer_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_pyinfer_error)
