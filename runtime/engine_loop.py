"""One turn of the engine's loop: messages in, a step, a report out. The same on a thread and in a process."""

from __future__ import annotations

import time
from collections.abc import Iterable

from pyinfer.errors import OverloadedError
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.engine_messages import AbortRequest, Message, StepReport
from pyinfer.runtime.outputs import RequestFailure, RequestOutput


def turn(engine: Engine, messages: Iterable[Message]) -> StepReport:
    """Take the messages, run one step; an error in a message fails its request alone."""
    start = time.monotonic()
    outputs = [output for message in messages for output in _handle(engine, message)]
    outputs += engine.step()
    now = time.monotonic()
    return StepReport(now, now - start, outputs, engine.events, engine.stats())


def _handle(engine: Engine, message: Message) -> list[RequestOutput]:
    if isinstance(message, AbortRequest):
        return engine.abort(message.request_id, message.index)
    try:
        if message.beams is not None:
            is_new = message.resume is None  # one that is not begins again: it tells nothing before its end
            engine.add_beam_search(
                message.request_id, message.prompt, message.beams, salt=message.salt, may_refuse=is_new
            )
        else:
            engine.add_request(
                message.request_id,
                message.prompt,
                message.params,
                salt=message.salt,
                route=message.route,
                bad_words=message.bad_words,
                resume=message.resume,
            )
    except OverloadedError as error:
        failure = RequestFailure(str(error), error.error_type, error.http_status, error.retry_after)
        return [RequestOutput(message.request_id, failure=failure)]
    except Exception as error:
        return [RequestOutput(message.request_id, failure=RequestFailure(str(error), "server_error", 500))]
    return []
