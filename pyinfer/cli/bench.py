"""`pyinfer bench`: tokens per second, with llama-bench's options, tests and output."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from pyinfer.cli.common import checked
from pyinfer.cli.loading import LoadingLine
from pyinfer.cli.options import EngineOptions, with_some_engine_options
from pyinfer.errors import ConfigError

if TYPE_CHECKING:
    from pyinfer.cli.bench_output import Printer
    from pyinfer.graph.backend import DeviceInfo, StageConfig
    from pyinfer.quant.gguf import GGUFFile
    from pyinfer.runtime.bench import BenchTest
    from pyinfer.runtime.offload import Offload, OffloadPlan

_OUTPUTS = ("md", "json", "csv")
_MAX_PARALLEL = 4096
_MAX_TOKENS = 1 << 24


def parse_numbers(text: str) -> list[int]:
    """'512' or '128,512'."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is not a number or a list like 128,512") from None
    if not all(0 <= number <= _MAX_TOKENS for number in numbers):
        raise ConfigError(f"{text!r}: numbers must be in 0..{_MAX_TOKENS}")
    return numbers


def parse_parallel(text: str) -> list[int]:
    """The same for a number of sequences."""
    numbers = parse_numbers(text)
    if not all(1 <= number <= _MAX_PARALLEL for number in numbers):
        raise ConfigError(f"{text!r}: numbers must be in 1..{_MAX_PARALLEL}")
    return numbers


def parse_output(text: str) -> str:
    """The name of a format."""
    if text not in _OUTPUTS:
        raise ConfigError(f"{text!r} is not one of {', '.join(_OUTPUTS)}")
    return text


_NUMBERS = checked(parse_numbers)


@with_some_engine_options(
    "threads",
    "n_gpu_layers",
    "gpu_memory_utilization",
    "gpu_split",
    "gpu_expand",
    "cpu_moe",
    "n_cpu_moe",
    "op_offload",
    "op_offload_min_batch",
    "kv_cache_dtype",
    "max_num_batched_tokens",
    "block_size",
    "seed",
)
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A path, a name, pypi:PACKAGE or npm:PACKAGE.")],
    n_prompt: Annotated[
        str, typer.Option("-p", "--n-prompt", metavar="N,..", callback=_NUMBERS, help="Prompt tokens; 0: none.")
    ] = "512",
    n_gen: Annotated[
        str, typer.Option("-n", "--n-gen", metavar="N,..", callback=_NUMBERS, help="Generated tokens; 0: none.")
    ] = "128",
    n_depth: Annotated[
        str, typer.Option("-d", "--n-depth", metavar="N,..", callback=_NUMBERS, help="Tokens in the cache before.")
    ] = "0",
    n_parallel: Annotated[
        str,
        typer.Option("-B", "--n-parallel", metavar="N,..", callback=checked(parse_parallel), help="Sequences at once."),
    ] = "1",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, metavar="N", help="Samples of a test.")] = 5,
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="|".join(_OUTPUTS), callback=checked(parse_output), help="Format."),
    ] = "md",
    *,
    engine: EngineOptions,
) -> None:
    """Measure tokens per second of prompts (pp) and of generation (tg)."""
    from pyinfer.cli.bench_output import PRINTERS
    from pyinfer.cli.progress import terminal_progress
    from pyinfer.quant.gguf import GGUFFile
    from pyinfer.runtime.bench import make_tests
    from pyinfer.runtime.hub import resolve

    tests = make_tests(
        parse_numbers(n_prompt), parse_numbers(n_gen), parse_numbers(n_depth), parse_parallel(n_parallel)
    )
    if not tests:
        raise typer.BadParameter("-p 0 -n 0 leaves nothing to measure")
    with GGUFFile.open(resolve(model, terminal_progress())) as file:
        _run(file, tests, repetitions, engine, PRINTERS[output])


def _run(
    file: GGUFFile, tests: list[BenchTest], repetitions: int, engine: EngineOptions, printer_kind: type[Printer]
) -> None:
    from pyinfer.graph.backend import StageConfig
    from pyinfer.runtime.bench import BenchRunner, pages_needed
    from pyinfer.runtime.load_options import LoadOptions
    from pyinfer.runtime.model_info import model_info
    from pyinfer.runtime.models.registry import build_graph
    from pyinfer.runtime.offload import keeps_copies, make_plan
    from pyinfer.runtime.placement import place, with_step_tokens
    from pyinfer.runtime.threads import default_threads

    graph = build_graph(file)
    n_threads = engine.n_threads or default_threads()
    options = LoadOptions(**engine.as_kwargs())
    config = StageConfig(
        n_pages=max(pages_needed(test, engine.block_size, len(graph.kv_groups)) for test in tests),
        block_size=engine.block_size,
        kv_dtype=engine.kv_cache_dtype,
        max_tokens=options.step_tokens,
        max_sequences=max(test.n_parallel for test in tests),
        n_ctx=max(test.n_ctx for test in tests),
        n_threads=n_threads,
    )

    def sizes(offload: Offload, devices: Sequence[DeviceInfo]) -> StageConfig | None:
        share, max_tokens = engine.gpu_memory_utilization, with_step_tokens(options, offload, devices).step_tokens
        sized = dataclasses.replace(config, max_tokens=max_tokens)
        expand = keeps_copies(graph, sized, devices, offload, share, options.gpu_expand)
        sized = dataclasses.replace(sized, gpu_expand=expand)
        plan = make_plan(graph, sized, devices, offload, share)
        if plan.max_pages() < sized.n_pages:
            return None
        _check_memory(plan, sized)
        return sized

    line = LoadingLine()
    placed = place(graph, options, sizes, line)
    stage = placed.stage
    try:
        runner = BenchRunner(
            stage,
            n_vocab=graph.n_vocab,
            block_size=engine.block_size,
            max_tokens=placed.config.max_tokens,
            n_groups=len(graph.kv_groups),
            seed=engine.seed,
        )
        line.clear()
        for text in placed.lines:
            print(text, file=sys.stderr)
        shown = dataclasses.replace(
            engine, n_gpu_layers=placed.n_gpu_layers, max_num_batched_tokens=placed.config.max_tokens
        )
        printer = printer_kind(model_info(file), shown, n_threads)
        watched = sys.stderr.isatty()
        for test in tests:
            result = runner.run(test, repetitions, partial(_show_sample, line, test, repetitions) if watched else None)
            line.clear()
            printer.add(result)
        printer.end()
    finally:
        line.clear()
        stage.close()


def _check_memory(plan: OffloadPlan, config: StageConfig) -> None:
    from pyinfer.runtime.memory import memory
    from pyinfer.runtime.sizes import format_binary

    needed = config.n_pages * sum(stage.page_bytes for stage in plan.stages if stage.device is None)
    available = memory().available
    if needed > available:
        raise ConfigError(
            f"the keys and values of these tests need {format_binary(needed)} and {format_binary(available)} of memory "
            "are available; choose a smaller -d, -p, -n or -B"
        )


def _show_sample(line: LoadingLine, test: BenchTest, total: int, number: int) -> None:
    line(f"{test.name}: {f'sample {number} of {total}' if number else 'warm-up'}", number / (total + 1))
