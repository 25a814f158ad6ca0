"""What the server says about itself: models, health, version, properties, statistics, and the chat page."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

import pyinfer
from pyinfer.server.errors import error_body, json_response
from pyinfer.server.reply import service_of
from pyinfer.server.service import Service

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> Response:
    service = service_of(request)
    data = [_card(service, name) for name in service.names]
    return json_response(msgspec.json.encode({"object": "list", "data": data}))


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    service = service_of(request)
    return json_response(msgspec.json.encode(_card(service, service.check_name(name))))


def _card(service: Service, name: str) -> dict[str, Any]:
    card: dict[str, Any] = {"id": name, "object": "model", "created": service.created, "owned_by": "pyinfer"}
    if service.is_ready:
        loaded = service.model()
        card |= {"max_model_len": loaded.n_ctx, "meta": {"n_ctx_train": loaded.n_ctx_train, **loaded.description}}
    return card


@router.get("/health")
async def health(request: Request) -> Response:
    service = service_of(request)
    if not service.is_ready:
        body = error_body("the model is still loading", "server_error", code="model_loading")
    elif not service.model().client.is_ready:
        body = error_body("the engine is being started again", "server_error", code="engine_restarting")
    else:
        return json_response(b'{"status":"ok"}')
    return json_response(body, 503, {"Retry-After": "1"})


@router.get("/version")
async def version(request: Request) -> Response:
    return json_response(msgspec.json.encode({"version": pyinfer.__version__}))


@router.get("/props")
async def props(request: Request) -> Response:
    """llama-server's properties, as far as they exist here."""
    service = service_of(request)
    loaded = service.model()
    return json_response(
        msgspec.json.encode(
            {
                "default_generation_settings": {
                    "n_ctx": loaded.n_ctx,
                    "params": msgspec.structs.asdict(loaded.chat_defaults),
                },
                "total_slots": loaded.max_num_seqs,
                "model_alias": service.names[0],
                "model_path": loaded.path,
                "chat_template": loaded.template.sources.get("default", ""),
                "bos_token": loaded.template.bos_token,
                "eos_token": loaded.template.eos_token,
                "build_info": f"pyinfer-{pyinfer.__version__}",
            }
        )
    )


@router.get("/stats")
async def stats(request: Request) -> Response:
    """The engine's counters: requests, pages, tokens."""
    return json_response(msgspec.json.encode(service_of(request).model().client.stats()))


@router.get("/")
async def page(request: Request) -> Response:
    """The chat page; it loads nothing from elsewhere, and its policy says so."""
    text = files("pyinfer.server").joinpath("page.html").read_text("utf-8")
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})
