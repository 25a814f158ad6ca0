"""The ASGI application: routes, errors, API key and CORS."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pyinfer.server import chat, completions, meta, metrics, text
from pyinfer.server.errors import AuthenticationError, error_response, install_handlers
from pyinfer.server.service import Service

_OPEN_PATHS = frozenset({"/", "/health", "/version"})


def create_app(service: Service, *, api_key: str | None = None, cors_origins: Sequence[str] = ()) -> FastAPI:
    """`api_key` is asked for everywhere but on the page, /health and /version; CORS is off without origins."""
    # the built-in documentation pages load their scripts from elsewhere
    app = FastAPI(title="pyinfer", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    for module in (meta, chat, completions, text, metrics):
        app.include_router(module.router)
    install_handlers(app)
    if api_key is not None:
        app.add_middleware(_ApiKey, key=api_key)
    if cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
    return app


class _ApiKey:
    """Lets through what carries `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            given = Headers(scope=scope).get("authorization", "").encode("utf-8", "replace")
            if not secrets.compare_digest(given, self._expected):
                text = "a wrong API key" if given else "no API key"
                error = AuthenticationError(
                    f"the request has {text}; send the header 'Authorization: Bearer KEY'", code="invalid_api_key"
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
