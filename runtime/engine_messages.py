"""What a client and an engine say to each other: on a thread as it is, between processes as msgpack."""

from __future__ import annotations

from typing import Any

import msgspec

from pyinfer import errors
from pyinfer.errors import EngineError, PyinferError
from pyinfer.graph.backend import StageConfig
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.outputs import EngineStats, RequestOutput
from pyinfer.runtime.request_events import RequestEvent
from pyinfer.runtime.request_limits import RequestLimits
from pyinfer.runtime.sampling_params import SamplingParams

# ---- to the engine


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    prompt: list[int]
    params: SamplingParams
    salt: str = ""
    bad_words: list[list[int]] | None = None  # those of the parameters, spelled; None: the engine can do it
    resume: list[list[int] | None] | None = None  # by sample: what it produced in an engine that died; None: it ended
    route: str = ""  # its kind: requests of one kind are taken to have answers of like lengths
    beams: BeamSearchParams | None = None  # a beam search, whose `sampling` are `params`


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    index: int | None = None  # a single sample


class LoadModel(msgspec.Struct, frozen=True, tag=True):
    path: str
    options: dict[str, Any]  # fields of `LoadOptions`


class Vocabulary(msgspec.Struct, frozen=True, tag=True):
    """Comes beside or after `LoadModel`, from where the tokenizer is."""

    n_vocab: int
    eog_ids: list[int]


class Close(msgspec.Struct, frozen=True, tag=True):
    """Give everything back and end."""


Message = AddRequest | AbortRequest
ToEngine = AddRequest | AbortRequest | LoadModel | Vocabulary | Close

# ---- from the engine


class Started(msgspec.Struct, frozen=True, tag=True):
    """The process is there and connected."""


class Loading(msgspec.Struct, frozen=True, tag=True):
    what: str
    share: float  # done, 0..1


class Loaded(msgspec.Struct, frozen=True, tag=True):
    limits: RequestLimits
    config: StageConfig  # sizes as they were chosen
    kv_bytes: int  # of the KV pool
    placement: list[str] = []  # where everything is, a line a stage; empty if all is on the CPU


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    kind: str  # name of the `PyinferError`
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: Exception) -> LoadFailed:
        if isinstance(error, PyinferError):
            return cls(type(error).__name__, str(error), error.param)
        if isinstance(error, MemoryError):
            return cls("EngineError", "out of memory; choose a smaller model, context (-c) or --kv-cache-memory")
        return cls("EngineError", f"the model could not be loaded: {type(error).__name__}: {error}")

    def error(self) -> PyinferError:
        """The same error, on the client's side."""
        kind = getattr(errors, self.kind, EngineError)
        assert issubclass(kind, PyinferError)
        return kind(self.message, param=self.param)


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """All that one turn of the engine's loop did: it is also the engine's sign of life."""

    time: float  # `time.monotonic` at its end
    seconds: float  # how long it took
    outputs: list[RequestOutput]
    events: list[RequestEvent]
    stats: EngineStats


FromEngine = Started | Loading | Loaded | LoadFailed | StepReport
