"""`load_model`: a GGUF file becomes an engine, with its tokenizer and chat template beside it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from pyinfer.graph.backend import Progress, StageConfig, kv_page_bytes
from pyinfer.graph.graph import Graph
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.chat_template import ChatTemplate
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.kv_size import plan_sizes
from pyinfer.runtime.load_options import LoadOptions, load_options
from pyinfer.runtime.model_info import ModelInfo, model_info
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.tokenizer import Tokenizer, load_tokenizer
from pyinfer.runtime.vocabulary_facts import Vocabulary

__all__ = ["LoadOptions", "LoadedModel", "OpenedEngine", "load_model", "load_options", "open_engine", "plan_sizes"]


@dataclass(slots=True, eq=False)
class LoadedModel:
    """Everything that serves one model. `close` ends the engine's stage and unmaps the file."""

    file: GGUFFile
    tokenizer: Tokenizer
    graph: Graph
    engine: Engine
    chat_template: ChatTemplate  # false if the model has none
    info: ModelInfo
    config: StageConfig  # sizes as they were chosen
    kv_bytes: int  # of the KV pool
    placement: list[str]  # where everything is, a line a stage; empty if all is on the CPU

    @property
    def n_ctx(self) -> int:
        """The longest sequence, prompt and answer together."""
        return self.engine.n_ctx

    @property
    def chat_params(self) -> SamplingParams:
        """What a chat samples with if its user says nothing."""
        return SamplingParams.for_chat(self.file.metadata)

    def close(self) -> None:
        self.engine.close()
        self.file.close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_model(path: str | Path, *, progress: Progress | None = None, **options: Any) -> LoadedModel:
    """Open a GGUF file and make it ready to run; `options` are the fields of `LoadOptions`.

    `progress` is called with what is being done and the share done. Raises a `PyinferError` that names what is wrong.
    """
    chosen = load_options(options)
    file = GGUFFile.open(path)
    try:
        with ThreadPoolExecutor(1, "pyinfer-tokenizer") as pool:
            tokenizer = pool.submit(load_tokenizer, file)
            opened = open_engine(file, chosen, tokenizer.result, progress)
            try:
                return LoadedModel(
                    file=file,
                    tokenizer=tokenizer.result(),
                    graph=opened.graph,
                    engine=opened.engine,
                    chat_template=ChatTemplate.from_gguf(file, override=chosen.chat_template),
                    info=model_info(file),
                    config=opened.engine.config,
                    kv_bytes=opened.kv_bytes,
                    placement=opened.placement,
                )
            except BaseException:
                opened.engine.close()
                raise
    except BaseException:
        file.close()
        raise


@dataclass(frozen=True, slots=True)
class OpenedEngine:
    """A model's engine without its text side."""

    engine: Engine
    graph: Graph
    kv_bytes: int  # of the KV pool
    n_gpu_layers: int  # blocks on GPUs, and 1 more with the head
    placement: list[str]  # where everything is, a line a stage; empty if all is on the CPU


def open_engine(
    file: GGUFFile, options: LoadOptions, vocabulary: Callable[[], Vocabulary], progress: Progress | None
) -> OpenedEngine:
    """Weights, kernels and pages. `vocabulary` is asked last, so that it can be read meanwhile."""
    from pyinfer.runtime.models.registry import build_graph
    from pyinfer.runtime.placement import place, size_pool

    built = build_graph(file)
    placed = place(built, options, partial(size_pool, built, file.size, options), progress, file.identity)
    stage, graph, config = placed.stage, placed.graph, placed.config
    n_swap_pages = config.n_pages // 4 if options.swap_space is None else options.swap_space // placed.plan.page_bytes
    try:
        engine = Engine(
            stage,
            config,
            vocabulary(),
            n_vocab=graph.n_vocab,
            kv_groups=graph.kv_groups,
            seed=options.seed,
            prefix_caching=options.enable_prefix_caching,
            policy=options.scheduling_policy,
            preemption_mode=options.preemption_mode,
            n_swap_pages=n_swap_pages,
            max_queue_wait=options.max_queue_wait,
            multi_step=options.num_scheduler_steps,
            overlap=options.async_scheduling,
        )
    except BaseException:
        stage.close()
        raise
    kv_bytes = config.n_pages * kv_page_bytes(graph, config.block_size, config.kv_dtype)
    return OpenedEngine(engine, graph, kv_bytes, placed.n_gpu_layers, placed.lines)
