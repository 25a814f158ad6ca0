"""`LoadOptions`: what can be chosen about a model's engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyinfer.errors import ConfigError
from pyinfer.graph.backend import split_kv_dtype
from pyinfer.runtime.offload import GPU_EXPAND, GPU_SPLIT, GPUExpand, GPULayers, GPUSplit, check_layers
from pyinfer.runtime.policy import POLICIES
from pyinfer.runtime.preemption_cost import PREEMPTION_MODES

STEP_TOKENS = 512  # of a step where nothing else is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What can be chosen about a model's engine; checked when built."""

    n_ctx: int = 0  # 0: the model's, or what the KV pool holds
    n_gpu_layers: GPULayers = 0  # blocks; more than there are, or "all": everything; "auto": what fits
    gpu_memory_utilization: float = 0.9  # share of each GPU's memory that may be in use
    gpu_split: GPUSplit = "layer"  # how several GPUs share a model: a run of blocks each, or a part of every block
    gpu_expand: GPUExpand = (
        "auto"  # float16 copies of packed matrices on GPUs, for prompts; auto: if there is much room
    )
    cpu_moe: bool = False  # the experts of all blocks stay on the CPU, whatever else is on GPUs
    n_cpu_moe: int = 0  # those of so many blocks do, the first ones
    op_offload: bool = True  # products of the CPU's blocks run on a GPU that has others, in steps of many tokens
    op_offload_min_batch: int = 32  # how many those are
    n_threads: int | None = None  # None: physical cores this process may use
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # of a step; None: 512, and 2048 with everything on large GPUs
    block_size: int = 16
    kv_cache_dtype: str = "f16"
    kv_cache_memory: int | None = None  # bytes; None: min(4 GiB, half of what is free after the weights)
    seed: int = 0
    enable_prefix_caching: bool = True
    scheduling_policy: str = "priority"  # fcfs, priority or ssjf
    preemption_mode: str = "auto"  # recompute, swap, or what is measured to be cheaper
    max_queue_wait: float | None = None  # seconds: who would wait longer is refused; None: nobody
    num_scheduler_steps: int = 1  # most steps of decoding that are decided at once, while nobody comes or goes
    async_scheduling: bool = True  # on a GPU a step is started before the last one's tokens are known
    swap_space: int | None = None  # bytes of host memory for swapped pages; None: a quarter of the KV pool
    backend: str = "cpu"
    repack_cache: int = 0  # bytes that repacked weights may take on disk; 0 keeps none
    chat_template: Path | None = None  # a Jinja file that replaces the model's own

    def __post_init__(self) -> None:
        check_layers(self.n_gpu_layers)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0 and at most 1",
                param="gpu_memory_utilization",
            )
        at_least_1 = (
            "max_num_seqs", "max_num_batched_tokens", "block_size", "num_scheduler_steps", "op_offload_min_batch",
        )  # fmt: skip
        for name, low in (("n_ctx", 0), ("n_cpu_moe", 0), *((name, 1) for name in at_least_1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} is {value}; it must be at least {low}", param=name)
        if self.block_size > 64:
            raise ConfigError(f"block_size is {self.block_size}; it must be at most 64", param="block_size")
        if self.n_threads is not None and self.n_threads < 1:
            raise ConfigError(f"n_threads is {self.n_threads}; it must be at least 1", param="n_threads")
        split_kv_dtype(self.kv_cache_dtype)
        for name, known_values in (
            ("scheduling_policy", POLICIES),
            ("preemption_mode", PREEMPTION_MODES),
            ("gpu_expand", GPU_EXPAND),
            ("gpu_split", GPU_SPLIT),
        ):
            if getattr(self, name) not in known_values:
                known = ", ".join(known_values)
                raise ConfigError(f"{name} is {getattr(self, name)!r}; known: {known}", param=name)
        if self.max_queue_wait is not None and not self.max_queue_wait >= 0:
            raise ConfigError(f"max_queue_wait is {self.max_queue_wait}; it must be 0 or more", param="max_queue_wait")
        if self.swap_space is not None and self.swap_space < 0:
            raise ConfigError("swap_space must be a number of bytes, or 0 for none", param="swap_space")
        if self.repack_cache < 0:
            raise ConfigError("repack_cache must be a number of bytes, or 0 for none", param="repack_cache")
        if self.kv_cache_memory is not None and self.kv_cache_memory < 1:
            raise ConfigError("kv_cache_memory must be a positive number of bytes", param="kv_cache_memory")

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step."""
        return self.max_num_batched_tokens or STEP_TOKENS


def load_options(options: Mapping[str, Any]) -> LoadOptions:
    """Checked; `ConfigError` for a name that is no option."""
    unknown = options.keys() - LoadOptions.__dataclass_fields__.keys()
    if unknown:
        raise ConfigError(f"{min(unknown)} is not an option of a model", param=min(unknown))
    return LoadOptions(**options)
