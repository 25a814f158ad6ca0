"""The engine's process: `python -m pyinfer.runtime.engine_main LOG_LEVEL`, started by `EngineProcess`.

Standard input holds one line, the address of the client's sockets, and stays open as long as the client lives; standard
output carries nothing and stays open as long as this process does, so that each notices the other's end at once.
Heavy imports come while the client resolves the model's name. Here there is no tokenizer, and no server.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyinfer.runtime.engine import Engine
    from pyinfer.runtime.engine_messages import LoadModel, Message, ToEngine
    from pyinfer.runtime.engine_wire import EngineWire
    from pyinfer.runtime.vocabulary_facts import VocabularyFacts

_log = logging.getLogger("pyinfer.engine")


def main() -> int:
    """The exit code: 0 when told to end, 1 after a fault."""
    # Ctrl-C reaches the whole process group; the client decides when the engine ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    address = sys.stdin.buffer.readline()
    if not address:
        return 0
    _ask_kernel_to_end_with_client()
    threading.Thread(target=_end_with_client, name="pyinfer-parent", daemon=True).start()
    _keep_stdout_silent()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("pyinfer").setLevel(sys.argv[1].upper())

    import msgspec

    from pyinfer.runtime.engine_messages import Started
    from pyinfer.runtime.engine_wire import Address, EngineWire

    try:
        wire = EngineWire(msgspec.json.decode(address, type=Address))
        wire.reports.send(Started(), wait=60)
        _Process(wire).run()
    except Exception:
        _log.exception("the engine's process ends")
        return 1
    return 0


def _ask_kernel_to_end_with_client() -> None:
    """On Linux this process is killed when its input's other end closes, even if native code keeps the interpreter.

    Unlike PR_SET_PDEATHSIG this looks at the client's process, not at the thread of it that started this one.
    """
    try:
        from fcntl import F_GETFL, F_SETFL, F_SETOWN, F_SETSIG, FASYNC, fcntl
    except ImportError:
        return
    fcntl(0, F_SETOWN, os.getpid())
    fcntl(0, F_SETSIG, signal.SIGKILL)
    fcntl(0, F_SETFL, fcntl(0, F_GETFL) | FASYNC)


def _end_with_client() -> None:
    """Where the kernel does not, or where the client had gone before it was asked."""
    while os.read(0, 4096):
        pass
    os._exit(0)  # nobody is left to tell


def _keep_stdout_silent() -> None:
    """Only this process's end closes the pipe to the client; what is printed goes to stderr."""
    os.dup(1)  # never closed
    os.dup2(2, 1)


class _Process:
    """Loads when told to, then turns the engine's loop."""

    def __init__(self, wire: EngineWire) -> None:
        self._wire = wire
        self._early: list[Message] = []  # requests that came while the model was being loaded
        self._must_close = False

    def run(self) -> None:
        _import_what_loading_needs()
        from pyinfer.runtime.engine_messages import LoadModel

        while not self._must_close:
            message = self._wire.wait()
            if isinstance(message, LoadModel):
                return self._load_and_serve(message)
            self._take(message)
        return None

    def _take(self, message: ToEngine) -> None:
        from pyinfer.runtime.engine_messages import AbortRequest, AddRequest, Close

        if isinstance(message, AddRequest | AbortRequest):
            self._early.append(message)
        elif isinstance(message, Close):
            self._must_close = True

    def _load_and_serve(self, load: LoadModel) -> None:
        from pyinfer.errors import PyinferError
        from pyinfer.quant.gguf import GGUFFile
        from pyinfer.runtime.engine_messages import Loaded, LoadFailed, Loading
        from pyinfer.runtime.loader import load_options, open_engine

        def progress(what: str, share: float) -> None:
            self._wire.reports.send(Loading(what, share))

        try:
            with GGUFFile.open(load.path) as file:
                opened = open_engine(file, load_options(load.options), self._vocabulary, progress)
                engine = opened.engine
                try:
                    self._wire.reports.send(Loaded(engine.limits, engine.config, opened.kv_bytes, opened.placement))
                    self._serve(engine)
                finally:
                    engine.close()
        except _ClosedError:
            return
        except Exception as error:
            if self._is_serving:
                raise
            if not isinstance(error, PyinferError | MemoryError):
                _log.error("the model could not be loaded", exc_info=error)
            self._wire.reports.send(LoadFailed.of(error))

    _is_serving = False

    def _vocabulary(self) -> VocabularyFacts:
        """Waits until the client has read the tokenizer."""
        from pyinfer.runtime.engine_messages import Vocabulary
        from pyinfer.runtime.vocabulary_facts import VocabularyFacts

        while not self._must_close:
            message = self._wire.wait()
            if isinstance(message, Vocabulary):
                return VocabularyFacts(message.n_vocab, frozenset(message.eog_ids))
            self._take(message)
        raise _ClosedError

    def _serve(self, engine: Engine) -> None:
        from pyinfer.runtime.engine_loop import turn

        self._is_serving = True
        self._wire.reports.send(turn(engine, []))  # its first statistics
        while True:
            if not engine.has_work and not self._early:
                self._take(self._wire.wait())
            while (message := self._wire.receive()) is not None:
                self._take(message)
            if self._must_close:
                return
            messages, self._early = self._early, []
            self._wire.reports.send(turn(engine, messages))


class _ClosedError(Exception):
    """The client wants no engine any more."""


def _import_what_loading_needs() -> None:
    from pyinfer.runtime.backends import open_backend

    open_backend("cpu")


if __name__ == "__main__":
    sys.exit(main())
