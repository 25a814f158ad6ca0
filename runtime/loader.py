"""`load_model`: a GGUF file becomes an engine, with its tokenizer and chat template beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pyinfer.errors import BackendError, ConfigError
from pyinfer.graph.backend import Progress, StageConfig, kv_page_bytes, split_kv_dtype
from pyinfer.graph.graph import Graph
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.backends import open_backend
from pyinfer.runtime.chat_template import ChatTemplate
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.memory import memory
from pyinfer.runtime.model_info import ModelInfo, model_info
from pyinfer.runtime.policy import POLICIES
from pyinfer.runtime.preemption_cost import PREEMPTION_MODES
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.sizes import format_binary
from pyinfer.runtime.threads import default_threads
from pyinfer.runtime.tokenizer import Tokenizer, load_tokenizer
from pyinfer.runtime.vocabulary_facts import Vocabulary

_MAX_KV_MEMORY = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What can be chosen about a model's engine; checked when built."""

    n_ctx: int = 0  # 0: the model's, or what the KV pool holds
    n_gpu_layers: int = 0
    n_threads: int | None = None  # None: physical cores this process may use
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    block_size: int = 16
    kv_cache_dtype: str = "f16"
    kv_cache_memory: int | None = None  # bytes; None: min(4 GiB, half of what is free after the weights)
    seed: int = 0
    enable_prefix_caching: bool = True
    scheduling_policy: str = "priority"  # fcfs, priority or ssjf
    preemption_mode: str = "auto"  # recompute, swap, or what is measured to be cheaper
    max_queue_wait: float | None = None  # seconds: who would wait longer is refused; None: nobody
    num_scheduler_steps: int = 1  # most steps of decoding that are decided at once, while nobody comes or goes
    swap_space: int | None = None  # bytes of host memory for swapped pages; None: a quarter of the KV pool
    backend: str = "cpu"
    chat_template: Path | None = None  # a Jinja file that replaces the model's own

    def __post_init__(self) -> None:
        if self.n_gpu_layers != 0:
            raise BackendError(
                f"n_gpu_layers is {self.n_gpu_layers}, and this version has no GPU backend; use 0", param="n_gpu_layers"
            )
        at_least_1 = ("max_num_seqs", "max_num_batched_tokens", "block_size", "num_scheduler_steps")
        for name, low in (("n_ctx", 0), *((name, 1) for name in at_least_1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {low}", param=name)
        if self.block_size % 16:
            raise ConfigError(f"block_size is {self.block_size}; it must be a multiple of 16", param="block_size")
        if self.n_threads is not None and self.n_threads < 1:
            raise ConfigError(f"n_threads is {self.n_threads}; it must be at least 1", param="n_threads")
        split_kv_dtype(self.kv_cache_dtype)
        for name, known_values in (("scheduling_policy", POLICIES), ("preemption_mode", PREEMPTION_MODES)):
            if getattr(self, name) not in known_values:
                known = ", ".join(known_values)
                raise ConfigError(f"{name} is {getattr(self, name)!r}; known: {known}", param=name)
        if self.max_queue_wait is not None and not self.max_queue_wait >= 0:
            raise ConfigError(f"max_queue_wait is {self.max_queue_wait}; it must be 0 or more", param="max_queue_wait")
        if self.swap_space is not None and self.swap_space < 0:
            raise ConfigError("swap_space must be a number of bytes, or 0 for none", param="swap_space")
        if self.kv_cache_memory is not None and self.kv_cache_memory < 1:
            raise ConfigError("kv_cache_memory must be a positive number of bytes", param="kv_cache_memory")


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
                )
            except BaseException:
                opened.engine.close()
                raise
    except BaseException:
        file.close()
        raise


def load_options(options: Mapping[str, Any]) -> LoadOptions:
    """Checked; `ConfigError` for a name that is no option."""
    unknown = options.keys() - LoadOptions.__dataclass_fields__.keys()
    if unknown:
        raise ConfigError(f"{min(unknown)} is not an option of a model", param=min(unknown))
    return LoadOptions(**options)


@dataclass(frozen=True, slots=True)
class OpenedEngine:
    """A model's engine without its text side."""

    engine: Engine
    graph: Graph
    kv_bytes: int  # of the KV pool


def open_engine(
    file: GGUFFile, options: LoadOptions, vocabulary: Callable[[], Vocabulary], progress: Progress | None
) -> OpenedEngine:
    """Weights, kernels and pages. `vocabulary` is asked last, so that it can be read meanwhile."""
    from pyinfer.graph.passes import for_context, optimize
    from pyinfer.runtime.models.registry import build_graph

    backend = open_backend(options.backend)
    graph = build_graph(file)
    config = plan_sizes(graph, file.size, options)
    graph = optimize(for_context(graph, config.n_ctx))
    page_bytes = kv_page_bytes(graph, config.block_size, config.kv_dtype)
    n_swap_pages = config.n_pages // 4 if options.swap_space is None else options.swap_space // page_bytes
    stage = backend.open_stage(graph, config, progress)
    try:
        engine = Engine(
            stage,
            config,
            vocabulary(),
            n_vocab=graph.n_vocab,
            seed=options.seed,
            prefix_caching=options.enable_prefix_caching,
            policy=options.scheduling_policy,
            preemption_mode=options.preemption_mode,
            n_swap_pages=n_swap_pages,
            max_queue_wait=options.max_queue_wait,
            multi_step=options.num_scheduler_steps,
        )
    except BaseException:
        stage.close()
        raise
    return OpenedEngine(engine, graph, config.n_pages * page_bytes)


def plan_sizes(graph: Graph, weight_bytes: int, options: LoadOptions, *, available: int | None = None) -> StageConfig:
    """Choose the KV pool and the context. `available` is the free memory in bytes; None measures it."""
    page_bytes = kv_page_bytes(graph, options.block_size, options.kv_cache_dtype)
    kv_memory = options.kv_cache_memory
    if kv_memory is None:
        available = memory().available if available is None else available
        kv_memory = min(_MAX_KV_MEMORY, max(0, available - weight_bytes) // 2)
    n_pages = kv_memory // page_bytes
    if n_pages < 1:
        raise ConfigError(
            f"{format_binary(kv_memory)} of memory for keys and values holds no page of {options.block_size} tokens, "
            f"which takes {format_binary(page_bytes)}; free some memory or set kv_cache_memory",
            param="kv_cache_memory",
        )
    held = n_pages * options.block_size
    if options.n_ctx > graph.n_ctx_train:
        raise ConfigError(
            f"n_ctx is {options.n_ctx}, but the model was made for {graph.n_ctx_train} tokens; use at most that",
            param="n_ctx",
        )
    if options.n_ctx > held:
        needed = -(-options.n_ctx // options.block_size) * page_bytes
        raise ConfigError(
            f"n_ctx is {options.n_ctx}, which takes {format_binary(needed)} of keys and values, but there is room for "
            f"{held} tokens in {format_binary(kv_memory)}; use a smaller n_ctx or set kv_cache_memory",
            param="n_ctx",
        )
    n_ctx = options.n_ctx or min(graph.n_ctx_train, held)
    return StageConfig(
        n_pages=n_pages,
        block_size=options.block_size,
        kv_dtype=options.kv_cache_dtype,
        max_tokens=options.max_num_batched_tokens,
        max_sequences=options.max_num_seqs,
        n_ctx=n_ctx,
        n_threads=options.n_threads or default_threads(),
    )
