"""What all answers of one request share: id, time, model, and the outer form of bodies and chunks."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import Request

import pyinfer
from pyinfer.server.generation import Usage
from pyinfer.server.service import Service


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


class Reply:
    """One request's envelope."""

    def __init__(self, kind: str, model: str, include_usage: bool = False) -> None:
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.include_usage = include_usage
        self._created = int(time.time())
        self._model = model

    def _envelope(self, object_name: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object_name,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": f"pyinfer-{pyinfer.__version__}",
        }

    def whole(self, object_name: str, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {**self._envelope(object_name), "choices": choices, "usage": usage.as_json()}

    def chunk(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One event of a stream; with `include_usage` each says that the counts are still to come."""
        body = {**self._envelope(object_name), "choices": choices}
        return {**body, "usage": None} if self.include_usage else body

    def usage_chunk(self, object_name: str, usage: Usage) -> dict[str, Any]:
        """The last event of a stream with `include_usage`."""
        return {**self._envelope(object_name), "choices": [], "usage": usage.as_json()}
