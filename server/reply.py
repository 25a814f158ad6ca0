"""What all answers of one request share: id, time, model, and the outer form of bodies and chunks."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
from fastapi import Request

import pyinfer
from pyinfer.server.generation import Usage
from pyinfer.server.service import Service


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


_encode = msgspec.json.Encoder().encode


class Reply:
    """One request's envelope."""

    def __init__(self, kind: str, model: str, chunk_name: str, include_usage: bool = False) -> None:
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.include_usage = include_usage
        self._created = int(time.time())
        self._model = model
        self._chunk_name = chunk_name
        # all events of a stream begin and end alike; with `include_usage` each says that the counts are still to come
        self._event_start = b"data: " + _encode(self._envelope(chunk_name))[:-1] + b',"choices":['
        self._event_end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

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

    def event(self, choice: dict[str, Any]) -> bytes:
        """One event of a stream."""
        return b"".join((self._event_start, _encode(choice), self._event_end))

    def event_beside(self, choice: dict[str, Any], **fields: Any) -> bytes:
        """An event with more than its choice."""
        end = b"]," + _encode(fields)[1:-1] + self._event_end[1:]
        return b"".join((self._event_start, _encode(choice), end))

    def usage_event(self, usage: Usage) -> bytes:
        """The last event of a stream with `include_usage`."""
        return b"data: " + _encode(self.whole(self._chunk_name, [], usage)) + b"\n\n"
