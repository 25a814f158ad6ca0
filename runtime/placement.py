"""Where a model's stages go by the room that devices have, on the CPU, on GPUs, or on both, and opening them there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pyinfer.errors import BackendError, ConfigError, DeviceMemoryError
from pyinfer.graph.backend import DeviceInfo, Progress, Stage, StageConfig, kv_page_bytes
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import ExpertMatMul
from pyinfer.graph.passes import for_context, optimize
from pyinfer.runtime.backends import gpus
from pyinfer.runtime.borrow_plan import HostBytes, host_bytes, least_tokens
from pyinfer.runtime.kv_size import MAX_KV_MEMORY, plan_sizes
from pyinfer.runtime.load_options import LoadOptions
from pyinfer.runtime.memory import memory
from pyinfer.runtime.offload import Offload, OffloadPlan, candidates, keeps_copies, make_plan, make_tensor_plan
from pyinfer.runtime.open_stages import open_stages
from pyinfer.runtime.page_layout import PageLayout

_log = logging.getLogger(__name__)
_HOST_SHARE = 0.7  # of what is free on the host, for weights that are there twice
_LARGE_GPU, _LARGE_STEP = 16_000_000_000, 2048  # bytes of memory, tokens; vLLM's default for such a GPU
_LEAST_CONTEXT = 8192  # tokens that must fit before weights take the rest of a GPU, if the model has so many


@dataclass(slots=True, eq=False)
class Placed:
    """A model that is ready to run."""

    stage: Stage
    graph: Graph  # the whole
    config: StageConfig
    plan: OffloadPlan

    @property
    def n_gpu_layers(self) -> int:
        return self.plan.offload.n_layers

    @property
    def lines(self) -> list[str]:
        """Where everything is, a line a stage; empty if all is on the CPU."""
        return self.plan.lines(self.config.n_pages) if self.n_gpu_layers else []


# the sizes with this on GPUs; None if a GPU lacks room for it
Sizes = Callable[[Offload, Sequence[DeviceInfo]], StageConfig | None]


def place(graph: Graph, options: LoadOptions, sizes: Sizes, progress: Progress | None, weights_id: str = "") -> Placed:
    """Plan, then load; what does not fit after all is planned anew with fewer layers on the GPU, and a warning.

    `graph` is as the model's builder made it.
    """
    devices = find_devices(options)
    layers = options.n_gpu_layers if devices else 0
    n_cpu_experts = cpu_experts(graph, options)
    most_tokens, min_batch = options.step_tokens, options.op_offload_min_batch
    op_offload = options.op_offload and bool(layers) and most_tokens >= min_batch
    expert_offload = op_offload and _has_experts(graph) and most_tokens >= least_tokens([graph], min_batch)
    asked, *less = candidates(
        layers, len(graph.kv_layers), n_cpu_experts, op_offload=op_offload, expert_offload=expert_offload
    )
    most = asked.n_blocks
    blocks = host_bytes(graph) if asked.op_offload else []
    if wants_tensor_split(options, devices) and not asked.has_embedding:
        raise ConfigError(
            f"gpu_split is 'tensor', which needs everything on GPUs, and n_gpu_layers is {layers}; use 'all' or a layer split",
            param="gpu_split",
        )
    for candidate in (asked, *less):
        offload = candidate
        available = _HOST_SHARE * memory().available
        if offload.expert_offload and host_need(blocks, offload) > available:
            offload = replace(offload, expert_offload=False)
        if offload.op_offload and host_need(blocks, offload) > available:
            offload = replace(offload, op_offload=False)
        config = sizes(offload, devices) if offload.n_blocks <= most else None
        if config is None:
            continue
        config = replace(config, weights_id=weights_id)
        built = for_context(graph, config.n_ctx)
        whole = optimize(built)
        plan = plan_for(built, config, devices, offload, options, whole)
        is_asked = replace(offload, op_offload=asked.op_offload, expert_offload=asked.expert_offload) == asked
        if layers != "auto" and not is_asked and most == asked.n_blocks:
            _log.warning("there is no room for %s on the GPU; %s", _layers(asked), _instead(offload))
        try:
            stage = open_stages(plan, config, options.backend, progress, options.op_offload_min_batch)
        except DeviceMemoryError as error:
            if not offload.n_layers:
                raise
            is_borrowing = plan.borrowed is not None and layers != "auto"  # the same without comes next
            if not is_borrowing:
                most = offload.n_blocks - max(1, offload.n_blocks // 8)
            what = "op offload is left out" if is_borrowing else "fewer are tried"
            _log.warning("%s did not fit on the GPU after all (%s); %s", _layers(offload), error, what)
            continue
        if n_cpu_experts and not offload.n_layers:
            _log.warning("cpu_moe and n_cpu_moe change nothing: nothing runs on a GPU, so all experts are on the CPU")
        if asked.expert_offload and not offload.expert_offload and has_cpu_experts(offload, len(graph.kv_layers)):
            where = "host memory" if candidate.expert_offload else "the GPU"
            _log.warning("op_offload leaves out the experts on the CPU: %s lacks room for it", where)
        placed = Placed(stage, whole, config, plan)
        _report(placed, devices)
        return placed
    raise AssertionError("nothing on a GPU always fits")


def cpu_experts(graph: Graph, options: LoadOptions) -> int:
    """The experts of how many blocks, the first ones, are to stay on the CPU."""
    if not (options.cpu_moe or options.n_cpu_moe):
        return 0
    if not _has_experts(graph):
        _log.warning("cpu_moe and n_cpu_moe change nothing: the model has no experts")
        return 0
    return len(graph.kv_layers) if options.cpu_moe else min(options.n_cpu_moe, len(graph.kv_layers))


def has_cpu_experts(offload: Offload, n_blocks: int) -> bool:
    """Whether experts of blocks other than the last are on the CPU, and something is on a GPU."""
    return offload.n_layers > 0 and max(n_blocks - offload.n_blocks, min(offload.n_cpu_experts, n_blocks - 1)) > 0


def host_need(blocks: Sequence[HostBytes], offload: Offload) -> int:
    """Bytes of weights in host memory, repacked and as in the file, of these blocks of a model with experts or without."""
    first, copies, total = len(blocks) - offload.n_blocks, 1 + offload.expert_offload, 0
    for number, block in enumerate(blocks):
        if number < first:
            total += block.weights + (block.products if offload.op_offload else 0)
        if number < max(first, offload.n_cpu_experts):
            total += copies * block.experts
    return total


def _has_experts(graph: Graph) -> bool:
    return any(isinstance(op, ExpertMatMul) for op in graph.ops)


def wants_tensor_split(options: LoadOptions, devices: Sequence[DeviceInfo]) -> bool:
    return options.gpu_split == "tensor" and len(devices) > 1


def plan_for(
    graph: Graph,
    config: StageConfig,
    devices: Sequence[DeviceInfo],
    offload: Offload,
    options: LoadOptions,
    optimized: Graph | None = None,
) -> OffloadPlan:
    """Of a graph that is not yet optimized, and the same optimized where that is at hand.

    Less than everything is split by layers, whatever was asked for.
    """
    if wants_tensor_split(options, devices) and offload.has_embedding:
        return make_tensor_plan(graph, config, devices, offload, options.gpu_memory_utilization)
    return make_plan(optimized or optimize(graph), config, devices, offload, options.gpu_memory_utilization)


def find_devices(options: LoadOptions) -> list[DeviceInfo]:
    """The GPUs to plan for. `auto` goes without one, and says so where one is there and only software is missing."""
    if options.n_gpu_layers == 0:
        return []
    try:
        return gpus()
    except BackendError as error:
        if options.n_gpu_layers != "auto":
            raise
        if getattr(error, "has_device", False):
            _log.warning("all layers run on the CPU: %s", error)
        else:
            _log.info("all layers run on the CPU: %s", error)
        return []


def size_pool(
    graph: Graph, file_bytes: int, options: LoadOptions, offload: Offload, devices: Sequence[DeviceInfo]
) -> StageConfig | None:
    """Sizes for this offload; None if a GPU lacks room for its weights and the least context.

    Nothing on a GPU: half of the free memory, as ever. All on GPUs: what they have. Else both limits hold.
    """
    if not offload.n_layers:
        return plan_sizes(graph, file_bytes, options)
    options = with_step_tokens(options, offload, devices)
    page_bytes = kv_page_bytes(graph, options.block_size, options.kv_cache_dtype)
    n_ctx = options.n_ctx or min(graph.n_ctx_train, _LEAST_CONTEXT)
    layout = PageLayout(graph.kv_groups, options.block_size, options.step_tokens)
    least = options.kv_cache_memory // page_bytes if options.kv_cache_memory else layout.most_pages(n_ctx)
    config = plan_sizes(graph, 0, replace(options, n_ctx=0, kv_cache_memory=max(1, least) * page_bytes))
    share = options.gpu_memory_utilization
    expand = keeps_copies(graph, config, devices, offload, share, options.gpu_expand)
    plan = plan_for(graph, replace(config, gpu_expand=expand), devices, offload, options)
    n_pages = plan.max_pages()
    if n_pages < least:
        return None
    if options.kv_cache_memory:
        n_pages = least
    elif plan.is_all:
        n_pages = min(n_pages, options.max_num_seqs * layout.most_pages(options.n_ctx or graph.n_ctx_train))
    else:
        n_pages = min(n_pages, _host_pages(plan))
    config = plan_sizes(graph, 0, replace(options, kv_cache_memory=max(1, n_pages * page_bytes)))
    return replace(config, gpu_expand=expand)


def with_step_tokens(options: LoadOptions, offload: Offload, devices: Sequence[DeviceInfo]) -> LoadOptions:
    """With larger steps, unless a size is asked for, where everything is on large GPUs: prompts run faster in them.

    On small ones a step of so many tokens would keep those that decode waiting.
    """
    is_all = offload.has_embedding and not offload.n_cpu_experts
    if options.max_num_batched_tokens is None and is_all and min(device.total for device in devices) >= _LARGE_GPU:
        return replace(options, max_num_batched_tokens=_LARGE_STEP)
    return options


def _host_pages(plan: OffloadPlan) -> int:
    """Pages of which the host's part takes half of what is free, and which all together take what a CPU's pool would."""
    pages = MAX_KV_MEMORY // plan.page_bytes
    on_host = sum(stage.page_bytes for stage in plan.stages if stage.device is None)
    if on_host:
        pages = min(pages, max(0, memory().available - plan.host_weight_bytes) // 2 // on_host)
    return pages


def _layers(offload: Offload) -> str:
    blocks = f"{offload.n_blocks} block{'' if offload.n_blocks == 1 else 's'}"
    return f"{blocks} and the head" if offload.has_head else blocks


def _instead(offload: Offload) -> str:
    return f"it gets {_layers(offload)}" if offload.n_layers else "all layers run on the CPU"


def _report(placed: Placed, before: Sequence[DeviceInfo]) -> None:
    """Log the plan, and beside it what the GPUs say was taken."""
    for line in placed.lines:
        _log.info("%s", line)
    if not placed.n_gpu_layers:
        return
    free = {device.index: device.free for device in gpus()}
    for stage in placed.plan.stages:
        if stage.device is None or stage.device.index not in free:
            continue
        planned = stage.n_bytes(placed.config.n_pages)
        taken = next(d.free for d in before if d.index == stage.device.index) - free[stage.device.index]
        level = logging.WARNING if taken > 1.1 * planned else logging.INFO
        _log.log(level, "GPU %d: %.2f GiB planned, %.2f GiB taken", stage.device.index, planned / 2**30, taken / 2**30)
