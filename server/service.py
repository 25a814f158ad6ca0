"""`Service`: the one model that a server serves, and whether it is there yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pyinfer.errors import ModelNotFoundError
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.engine_client import Observer
from pyinfer.runtime.outputs import EngineStats, RequestOutput
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.server.errors import LoadingError
from pyinfer.server.request_log import RequestLog

if TYPE_CHECKING:
    from pyinfer.runtime.chat_template import ChatTemplate
    from pyinfer.runtime.tokenizer import Tokenizer


class Stream(Protocol):
    """A submitted request's chunks; closing it aborts the request."""

    async def take(self) -> list[RequestOutput]: ...

    async def aclose(self) -> None: ...


class Client(Protocol):
    """As much of `EngineClient` as the server uses."""

    observer: Observer | None

    def generate(self, prompt_ids: list[int], params: SamplingParams, *, request_id: str, route: str) -> Stream: ...

    def beam_search(
        self, prompt_ids: list[int], params: BeamSearchParams, *, request_id: str, route: str
    ) -> Stream: ...

    def abort(self, request_id: str, index: int | None = None) -> None: ...

    def stats(self) -> EngineStats: ...

    @property
    def is_ready(self) -> bool: ...

    async def drain(self, timeout: float) -> bool: ...


@dataclass(frozen=True)
class ServedModel:
    """A loaded model as the routes need it."""

    client: Client
    tokenizer: Tokenizer
    template: ChatTemplate
    n_ctx: int  # longest sequence, prompt and answer together
    n_ctx_train: int
    chat_defaults: SamplingParams
    path: str = ""
    max_num_seqs: int = 256
    description: dict[str, Any] = field(default_factory=dict)  # architecture, parameters, ... for /v1/models


class Service:
    """Holds the model once it is loaded; routes ask `model()` and get a 503 until then."""

    def __init__(self, names: Sequence[str], *, max_logprobs: int = 20) -> None:
        assert names
        self.names = list(names)
        self.max_logprobs = max_logprobs
        self.created = int(time.time())
        self.log = RequestLog()
        self._model: ServedModel | None = None

    @property
    def is_ready(self) -> bool:
        return self._model is not None

    def set_ready(self, model: ServedModel) -> None:
        model.client.observer = self.log
        self._model = model

    def model(self) -> ServedModel:
        if self._model is None:
            raise LoadingError("the model is still loading; try again in a moment", code="model_loading")
        return self._model

    async def drain(self, seconds: float) -> None:
        """Take no new requests; end those that still run after `seconds`."""
        if self._model is not None:
            await self._model.client.drain(seconds)

    def check_name(self, name: str | None) -> str:
        """The name to answer with; no name means the one model there is."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            known = ", ".join(self.names)
            raise ModelNotFoundError(
                f"the model {name!r} is not served here; use {known}", param="model", code="model_not_found"
            )
        return name
