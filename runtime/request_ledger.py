"""`RequestLedger`: what a client must remember of its requests, so that they can go on when their engine dies."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from pyinfer.runtime.engine_messages import AbortRequest, AddRequest, Message
from pyinfer.runtime.outputs import RequestFailure, RequestOutput

MAX_DEATHS = 3  # in a row, by faults, that a request may see without getting a token: it may well be their cause
SUSPECTED = RequestFailure(
    f"the engine died {MAX_DEATHS} times in a row while it worked on this request, which is not tried again; the "
    "server's log has the details",
    "server_error",
    500,
)


@dataclass(slots=True)
class _Entry:
    request: AddRequest
    outputs: list[list[int] | None]  # by sample; None: ended
    aborts: list[AbortRequest] = field(default_factory=list)  # asked for
    n_deaths: int = 0  # of engines, since the last token


class RequestLedger:
    """Requests in the order in which they came. Not locked."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, request: AddRequest) -> None:
        self._entries[request.request_id] = _Entry(request, [[] for _ in range(request.params.n_samples)])

    def abort(self, message: AbortRequest) -> None:
        entry = self._entries.get(message.request_id)
        if entry is not None:
            entry.aborts.append(message)

    def forget(self, request_id: str) -> None:
        self._entries.pop(request_id, None)

    def note(self, output: RequestOutput) -> None:
        """A chunk came."""
        entry = self._entries.get(output.request_id)
        if entry is None:
            return
        if output.failure is not None:
            del self._entries[output.request_id]
        elif output.finish_reason is not None:
            entry.outputs[output.index] = None
            if all(tokens is None for tokens in entry.outputs):
                del self._entries[output.request_id]
        else:
            tokens = entry.outputs[output.index]
            assert tokens is not None, "a chunk after a sample's last"
            tokens += output.new_token_ids
            entry.n_deaths = 0

    def count_death(self) -> list[str]:
        """The engine died; returns the requests that were there too often, which are forgotten."""
        for entry in self._entries.values():
            entry.n_deaths += 1
        suspects = [request_id for request_id, entry in self._entries.items() if entry.n_deaths >= MAX_DEATHS]
        for request_id in suspects:
            del self._entries[request_id]
        return suspects

    @property
    def request_ids(self) -> list[str]:
        return list(self._entries)

    def messages(self) -> list[Message]:
        """What makes a new engine go on where the old one ended."""
        messages: list[Message] = []
        for entry in self._entries.values():
            resume = [None if tokens is None else list(tokens) for tokens in entry.outputs]
            messages.append(msgspec.structs.replace(entry.request, resume=resume))  # what was taken is not refused
            messages += entry.aborts
        return messages
