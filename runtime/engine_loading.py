"""`EngineLoading`: how an engine's process comes to its model, the first time and after each death."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyinfer.errors import EngineError, PyinferError
from pyinfer.graph.backend import Progress
from pyinfer.runtime.engine_messages import Loaded, LoadFailed, Loading, LoadModel, Vocabulary
from pyinfer.runtime.vocabulary_facts import Vocabulary as VocabularyOf


class EngineLoading:
    """What is told to an engine that starts, and what it answers. `is_settled` once the first has loaded or failed."""

    def __init__(self) -> None:
        self.message = LoadModel("", {})
        self.tokenizer: VocabularyOf | None = None
        self.loaded: Loaded | None = None  # by the first engine; the next ones are made like it
        self.error: PyinferError | None = None
        self.is_settled = threading.Event()
        self._progress: Progress | None = None

    def begin(self, path: str | Path, options: Mapping[str, Any], progress: Progress | None) -> None:
        self.message = LoadModel(str(path), dict(options))
        self._progress = progress

    def vocabulary(self) -> Vocabulary | None:
        """None while the tokenizer is being read."""
        return None if self.tokenizer is None else Vocabulary(self.tokenizer.n_vocab, sorted(self.tokenizer.eog_ids))

    def advance(self, message: Loading) -> None:
        if self._progress is not None and self.loaded is None:
            self._progress(message.what, message.share)

    def succeed(self, loaded: Loaded) -> None:
        """From the first on, sizes are fixed: free memory may be another next time, and clients rely on the limits."""
        if self.loaded is None:
            self.loaded = loaded
            config = loaded.config
            sizes = {"n_ctx": config.n_ctx, "kv_cache_memory": loaded.kv_bytes, "n_threads": config.n_threads}
            self.message = LoadModel(self.message.path, {**self.message.options, **sizes})
        self.is_settled.set()

    def fail(self, failure: LoadFailed) -> None:
        self.error = failure.error()

    def result(self) -> Loaded | None:
        """Waits for the first engine; None if there is no engine, with the reason in `error` if that is known."""
        self.is_settled.wait()
        return self.loaded

    def died(self, how: str) -> None:
        """The process ended; before it had loaded, that is why there is no model."""
        if self.loaded is None and self.error is None:
            self.error = EngineError(f"the engine died with {how} while it loaded the model; is there memory?")
