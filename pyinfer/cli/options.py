"""The options that serve, run and bench share, and the dataclass they arrive in.

A command takes them in one parameter:

    @with_engine_options
    def serve(model: Annotated[str, typer.Argument()] = "", *, engine: EngineOptions) -> None: ...

On the command line `engine` becomes the flags below. app.py adds `--config`, `--debug`, `--log-level` to every command
and lets every option also come from `PYINFER_<OPTION>` or a TOML file, so no command file does anything for that.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from pyinfer.cli.common import checked, with_signature
from pyinfer.errors import ConfigError
from pyinfer.runtime.sizes import parse_size

_ENGINE_PANEL = "Engine"
_SCHEDULER_PANEL = "Scheduler"
_POLICIES = ("fcfs", "priority", "ssjf")
_PREEMPTION_MODES = ("auto", "recompute", "swap")
_GPU_EXPAND = ("auto", "on", "off")
_GPU_SPLIT = ("layer", "tensor")
# what one conversation in a terminal can use; the rest is about requests beside each other
ONE_USER = (
    "threads",
    "ctx_size",
    "n_gpu_layers",
    "gpu_memory_utilization",
    "gpu_split",
    "gpu_expand",
    "cpu_moe",
    "n_cpu_moe",
    "op_offload",
    "op_offload_min_batch",
    "kv_cache_dtype",
    "kv_cache_memory",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "seed",
    "repack_cache",
)


@dataclass(frozen=True)
class EngineOptions:
    """What a user can choose about the engine, checked; defaults are those of `LLM`, but for `n_gpu_layers`."""

    n_threads: int | None = None  # None: physical cores this process may use
    n_ctx: int = 0  # 0: the model's, or what the KV pool holds
    n_gpu_layers: int | str = "auto"  # blocks, "auto" or "all"
    gpu_memory_utilization: float = 0.9
    gpu_split: str = "layer"
    gpu_expand: str = "auto"
    cpu_moe: bool = False
    n_cpu_moe: int = 0
    op_offload: bool = True
    op_offload_min_batch: int = 32
    kv_cache_dtype: str = "f16"
    kv_cache_memory: int | None = None  # bytes; None: chosen from the free memory
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    seed: int = 0
    enable_prefix_caching: bool = True
    scheduling_policy: str = "priority"
    preemption_mode: str = "auto"
    swap_space: int | None = None  # bytes; None: a quarter of the KV pool
    max_queue_wait: float | None = None  # seconds; None: no limit
    num_scheduler_steps: int = 1
    async_scheduling: bool = True
    repack_cache: int = 0  # bytes; 0: off

    def as_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `LLM` and `load_model`."""
        return dataclasses.asdict(self)


def parse_cache_size(text: str) -> int:
    """Bytes; "off" is 0."""
    return 0 if text.strip().lower() == "off" else parse_size(text)


def parse_kv_dtype(text: str) -> str:
    """The text itself, if `split_kv_dtype` knows it."""
    from pyinfer.graph.backend import split_kv_dtype

    split_kv_dtype(text)
    return text


def _one_of(known: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise ConfigError(f"{text!r} is not one of {', '.join(known)}")
        return text

    return parse


def parse_gpu_layers(text: str) -> int | str:
    """A number of blocks, `auto` or `all`."""
    word = text.strip().lower()
    if word in ("auto", "all"):
        return word
    if word.isdecimal():
        return int(word)
    raise ConfigError(f"{text!r} is not a number of layers, 'auto' or 'all'", param="n_gpu_layers")


def parse_share(text: str) -> float:
    """A share of something, above 0 and at most 1."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"{text!r} is not a share above 0 and of at most 1, like 0.9")
    return share


def _engine_options(
    threads: Annotated[
        int | None,
        typer.Option(
            "-t",
            "--threads",
            min=1,
            metavar="N",
            help="Threads.",
            show_default="physical cores",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = None,
    ctx_size: Annotated[
        int,
        typer.Option(
            "-c",
            "--ctx-size",
            min=0,
            metavar="N",
            help="Context length in tokens; 0: the model's.",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = 0,
    n_gpu_layers: Annotated[
        str,
        typer.Option(
            "-ngl",
            "--n-gpu-layers",
            metavar="N|auto|all",
            callback=checked(parse_gpu_layers),
            help="Blocks on the GPU; all: with the head; auto: what fits, 0 without a GPU.",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = "auto",
    gpu_memory_utilization: Annotated[
        str,
        typer.Option(
            metavar="SHARE",
            callback=checked(parse_share),
            help="Share of a GPU's memory that may be in use.",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = "0.9",
    gpu_split: Annotated[
        str,
        typer.Option(
            metavar="|".join(_GPU_SPLIT),
            callback=checked(_one_of(_GPU_SPLIT)),
            help="How several GPUs share a model: a run of blocks each, or a part of every block.",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = "layer",
    gpu_expand: Annotated[
        str,
        typer.Option(
            metavar="|".join(_GPU_EXPAND),
            callback=checked(_one_of(_GPU_EXPAND)),
            help="Keep float16 copies of the weights on a GPU, for faster prompts; auto: if there is much room.",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = "auto",
    cpu_moe: Annotated[
        bool,
        typer.Option(
            "--cpu-moe",
            help="Leave the experts of all blocks on the CPU (mixture of experts).",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = False,
    n_cpu_moe: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Leave the experts of the first N blocks on the CPU.",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = 0,
    op_offload: Annotated[
        bool,
        typer.Option(
            help="Have a GPU multiply for the blocks and experts on the CPU, too, in steps of many tokens.",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = True,
    op_offload_min_batch: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="How many tokens those are; more for experts.", rich_help_panel=_ENGINE_PANEL
        ),
    ] = 32,
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            metavar="TYPE[,TYPE]",
            callback=checked(parse_kv_dtype),
            help="Type of keys and values, or of each: f16, f32, bf16, q8_0.",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = "f16",
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            callback=checked(parse_size),
            help="Memory for keys and values, like 2G.",
            show_default="4 GiB, or half of what is free",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Sequences that run at the same time.", rich_help_panel=_ENGINE_PANEL),
    ] = 256,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens in one step of the engine.",
            show_default="512; 2048 with everything on large GPUs",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = None,
    block_size: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            metavar="N",
            help="Tokens in one page of the KV cache: 16, 32 or 64 on the CPU.",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = 16,
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="Seed of the engine, for requests without one.", rich_help_panel=_ENGINE_PANEL),
    ] = 0,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Reuse the pages of equal beginnings.", rich_help_panel=_SCHEDULER_PANEL)
    ] = True,
    scheduling_policy: Annotated[
        str,
        typer.Option(
            metavar="|".join(_POLICIES),
            callback=checked(_one_of(_POLICIES)),
            help="Who goes first: who came first, a lower priority, or the shortest job by predicted length.",
            rich_help_panel=_SCHEDULER_PANEL,
        ),
    ] = "priority",
    preemption_mode: Annotated[
        str,
        typer.Option(
            metavar="|".join(_PREEMPTION_MODES),
            callback=checked(_one_of(_PREEMPTION_MODES)),
            help="What becomes of the pages of a request that gives way; auto: what is measured to be cheaper.",
            rich_help_panel=_SCHEDULER_PANEL,
        ),
    ] = "auto",
    swap_space: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            callback=checked(parse_size),
            help="Memory for pages that are swapped out, like 2G.",
            show_default="a quarter of that for keys and values",
            rich_help_panel=_SCHEDULER_PANEL,
        ),
    ] = None,
    max_queue_wait: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Refuse requests that would wait longer, with 429 and Retry-After.",
            show_default="no limit",
            rich_help_panel=_SCHEDULER_PANEL,
        ),
    ] = None,
    num_scheduler_steps: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Most steps decided at once, while nobody comes or goes.",
            rich_help_panel=_SCHEDULER_PANEL,
        ),
    ] = 1,
    async_scheduling: Annotated[
        bool,
        typer.Option(
            help="On a GPU start each step before the last one's tokens are known.", rich_help_panel=_SCHEDULER_PANEL
        ),
    ] = True,
    repack_cache: Annotated[
        str,
        typer.Option(
            metavar="SIZE|off",
            callback=checked(parse_cache_size),
            help="Disk that repacked weights may take under PYINFER_HOME, to be read at the next start.",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = "off",
) -> EngineOptions:
    return EngineOptions(
        n_threads=threads,
        n_ctx=ctx_size,
        n_gpu_layers=parse_gpu_layers(n_gpu_layers),
        gpu_memory_utilization=parse_share(gpu_memory_utilization),
        gpu_split=gpu_split,
        gpu_expand=gpu_expand,
        cpu_moe=cpu_moe,
        n_cpu_moe=n_cpu_moe,
        op_offload=op_offload,
        op_offload_min_batch=op_offload_min_batch,
        kv_cache_dtype=kv_cache_dtype,  # checked by its callback; to parse it again would import the graph
        kv_cache_memory=None if kv_cache_memory is None else parse_size(kv_cache_memory),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        seed=seed,
        enable_prefix_caching=enable_prefix_caching,
        scheduling_policy=scheduling_policy,
        preemption_mode=preemption_mode,
        swap_space=None if swap_space is None else parse_size(swap_space),
        max_queue_wait=max_queue_wait,
        num_scheduler_steps=num_scheduler_steps,
        async_scheduling=async_scheduling,
        repack_cache=parse_cache_size(repack_cache),
    )


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces the parameter `engine` of a command by all shared options, and gathers them again for the call."""
    return with_some_engine_options(*_SHARED)(command)


def with_some_engine_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same with the named options only, for a command on which the others would have no effect."""
    shared = [_SHARED[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.name != "engine"]

        @functools.wraps(command)
        def call(*args: Any, **kwargs: Any) -> None:
            engine = _engine_options(**{name: kwargs.pop(name) for name in names})
            command(*args, **kwargs, engine=engine)

        return with_signature(call, own.replace(parameters=[*kept, *shared]))

    return decorate


_SHARED = inspect.signature(_engine_options, eval_str=True).parameters
