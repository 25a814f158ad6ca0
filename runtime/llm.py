"""`LLM`: a model in this process, for scripts: prompts in, finished texts or logits out."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from pyinfer.errors import EngineError, RequestError
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.chat_prompt import chat_prompt
from pyinfer.runtime.chat_template import Message
from pyinfer.runtime.generation_job import GenerationJob
from pyinfer.runtime.hub import resolve
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    EngineStats,
    FloatMatrix,
    GenerationOutput,
    RequestOutput,
)
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.text_stream import beam_sequence

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """Loads a model (a path, a pulled or catalogue name, `pypi:PACKAGE`) and runs it; a context manager.

    Calls from several threads wait for each other; within a call all prompts run together. `options` are those of
    `pyinfer.runtime.loader.LoadOptions`: n_ctx=0, n_gpu_layers=0, n_threads=None, max_num_seqs=256,
    max_num_batched_tokens=None, block_size=16, kv_cache_dtype="f16", kv_cache_memory=None, seed=0, ...
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.model = load_model(resolve(str(model)), **options)
        self._engine = self.model.engine
        self._tokenizer = self.model.tokenizer
        self._lock = threading.Lock()
        self._n_requests = 0
        self._is_closed = False

    @property
    def n_ctx(self) -> int:
        """The longest sequence in tokens, prompt and answer together."""
        return self.model.n_ctx

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        return self._tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._tokenizer.decode(list(ids), skip_special=skip_special)

    def generate(
        self, prompts: Prompts, sampling_params: Params = None, use_tqdm: bool = True
    ) -> list[GenerationOutput]:
        """Complete each prompt; results are in the order of the prompts.

        Text is tokenized as `tokenize` does, so control tokens in it are plain text; ids are taken as they are.
        `sampling_params` is one for all or a list with one for each; None is `SamplingParams()`. `use_tqdm` shows
        progress on a terminal. `RequestError` for a prompt that can never be served, before any has run.
        """
        texts, prompt_ids = self._prompts(prompts)
        params = _one_each(sampling_params, SamplingParams(), len(prompt_ids))
        return self._generate(texts, prompt_ids, params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[GenerationOutput]:
        """Answer one conversation or several. No `sampling_params`: the model's own defaults, up to the context."""
        conversations: list[Sequence[Message]] = []
        for item in messages if messages and not isinstance(messages[0], Mapping) else [messages]:
            conversations.append(item)  # type: ignore[arg-type]
        prompt_ids = [
            chat_prompt(
                self.model.chat_template,
                self._tokenizer,
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        params = _one_each(sampling_params, self.model.chat_params, len(prompt_ids))
        texts: list[str | None] = [self._tokenizer.decode(ids, skip_special=False) for ids in prompt_ids]
        return self._generate(texts, prompt_ids, params, use_tqdm)

    def beam_search(self, prompts: Prompts, params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The likeliest texts after each prompt; prompts as for `generate`."""
        _, prompt_ids = self._prompts(prompts)
        found: list[list[BeamSearchSequence]] = [[] for _ in prompt_ids]
        for ids in prompt_ids:
            self._engine.limits.check_beam_search(ids, params)
        with self._exclusive():
            names = {self._new_id(): i for i in range(len(prompt_ids))}
            try:
                for name, i in names.items():
                    self._engine.add_beam_search(name, prompt_ids[i], params)
                while not all(found):
                    for output in self._step():
                        i = names[output.request_id]
                        found[i].append(beam_sequence(output, prompt_ids[i], self._tokenizer))
            except BaseException:
                self._drop(list(names))
                raise
        return [BeamSearchOutput(sequences) for sequences in found]

    @overload
    def logits(self, token_ids: Sequence[int]) -> FloatMatrix: ...
    @overload
    def logits(self, token_ids: Sequence[Sequence[int]]) -> list[FloatMatrix]: ...
    def logits(self, token_ids: Sequence[int] | Sequence[Sequence[int]]) -> FloatMatrix | list[FloatMatrix]:
        """Raw logits float32 [n_tokens, n_vocab] of ids as they are (no BOS is added); row i predicts token i + 1.

        A list of id lists runs as one batch and gives a list. Never reads the prefix cache. `RequestError` over n_ctx.
        """
        texts, prompts = self._prompts(token_ids if len(token_ids) else [[]])
        if any(text is not None for text in texts):
            raise RequestError("logits takes token ids, not text; use tokenize", param="token_ids")
        is_single = len(token_ids) == 0 or _is_int(token_ids[0])
        with self._exclusive():
            names = [self._new_id() for _ in prompts]
            waiting = set(names)
            try:
                for name, ids in zip(names, prompts, strict=True):
                    self._engine.add_scoring(name, ids)
                while waiting:
                    for output in self._step():
                        waiting.discard(output.request_id)
                results = [self._engine.take_logits(name) for name in names]
            except BaseException:
                self._drop(names)
                raise
        return results[0] if is_single else results

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        """Give the weights and the pages back; may be called twice."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self.model.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- inside

    def _prompts(self, prompts: Prompts) -> tuple[list[str | None], list[list[int]]]:
        """Every accepted form as texts (None for ids) and ids."""
        if isinstance(prompts, str):
            prompts = [prompts]
        items: list[Any] = list(prompts)
        if items and all(_is_int(item) for item in items):
            items = [items]
        texts: list[str | None] = []
        ids: list[list[int]] = []
        for item in items:
            if isinstance(item, str):
                texts.append(item)
                ids.append(self.tokenize(item))
            elif isinstance(item, Sequence) or hasattr(item, "tolist"):
                texts.append(None)
                ids.append(_as_ids(item))
            else:
                raise RequestError(
                    f"a prompt is of type {type(item).__name__}; give text, a list of token ids, or a list of those",
                    param="prompts",
                )
        return texts, ids

    def _generate(
        self, texts: list[str | None], prompts: list[list[int]], params: list[SamplingParams], use_tqdm: bool
    ) -> list[GenerationOutput]:
        for ids, each in zip(prompts, params, strict=True):
            self._engine.limits.check(ids, each)
        with self._exclusive(), _progress(len(prompts), use_tqdm) as advance:
            jobs: dict[str, GenerationJob] = {}
            try:
                for ids, each in zip(prompts, params, strict=True):
                    name = self._new_id()
                    jobs[name] = GenerationJob(self._engine, self._tokenizer, each)
                    self._engine.add_request(name, ids, each)
                running = set(jobs)
                while running:
                    for output in self._step():
                        if jobs[output.request_id].push(output):
                            running.discard(output.request_id)
                            advance()
            except BaseException:
                self._drop(list(jobs))
                raise
        return [
            job.result(name, text, ids) for (name, job), text, ids in zip(jobs.items(), texts, prompts, strict=True)
        ]

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock:
            if self._is_closed:
                raise EngineError("this LLM is closed")
            yield

    def _new_id(self) -> str:
        self._n_requests += 1
        return str(self._n_requests - 1)

    def _step(self) -> list[RequestOutput]:
        outputs = self._engine.step()
        for output in outputs:
            if output.failure is not None:
                raise EngineError(output.failure.message)
        return outputs

    def _drop(self, names: list[str]) -> None:
        for name in names:
            self._engine.abort(name)


def _as_ids(tokens: Iterable[Any]) -> list[int]:
    """Plain ints; a float is a mistake and not rounded."""
    try:
        return [index(token) for token in tokens]
    except TypeError:
        raise RequestError("a prompt of token ids must hold integers only", param="prompts") from None


def _is_int(item: object) -> bool:
    return hasattr(item, "__index__") and not hasattr(item, "__len__")


def _one_each(params: Params, default: SamplingParams, n: int) -> list[SamplingParams]:
    if params is None:
        return [default] * n
    if isinstance(params, SamplingParams):
        return [params] * n
    if len(params) != n:
        raise RequestError(
            f"{len(params)} sampling_params for {n} prompts; give one, or one for each", param="sampling_params"
        )
    return list(params)


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr if that is a terminal; what it yields counts one prompt."""
    if not wanted or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Prompts", total=total)
        yield lambda: bar.advance(task)
