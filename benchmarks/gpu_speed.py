"""Sections of `gpu_check.py` that measure: tokens a second of models of real shapes, all on the GPU or half."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_report import Report


@dataclass(frozen=True)
class Row:
    """One line of the table of speeds; goals are for one H200."""

    model: str
    mix: str
    work: str
    goal: float  # tokens a second
    n_prompt: int = 0
    n_gen: int = 0
    depth: int = 0
    n_parallel: int = 1


ROWS = (
    Row("llama-3.1-8b", "Q4_K_M", "decode, 1 sequence", 600, n_gen=128),
    Row("llama-3.1-8b", "Q4_K_M", "decode at depth 4096", 550, n_gen=64, depth=4096),
    Row("llama-3.1-8b", "Q4_K_M", "decode at depth 16384", 450, n_gen=64, depth=16384),
    Row("llama-3.1-8b", "Q4_K_M", "decode, 8 sequences", 3500, n_gen=64, depth=128, n_parallel=8),
    Row("llama-3.1-8b", "Q4_K_M", "decode, 32 sequences", 9000, n_gen=64, depth=128, n_parallel=32),
    Row("llama-3.1-8b", "Q4_K_M", "decode, 64 sequences", 13000, n_gen=64, depth=128, n_parallel=64),
    Row("llama-3.1-8b", "Q4_K_M", "decode, 128 sequences", 20000, n_gen=64, depth=128, n_parallel=128),
    Row("llama-3.1-8b", "Q4_K_M", "pp512", 26000, n_prompt=512),
    Row("llama-3.1-8b", "Q4_K_M", "pp2048", 45000, n_prompt=2048),
    Row("llama-3.1-8b", "Q8_0", "decode, 1 sequence", 420, n_gen=128),
    Row("llama-3.2-1b", "Q4_K_M", "decode, 1 sequence", 2000, n_gen=256),
)
HALF = (
    Row("llama-3.1-8b", "Q4_K_M", "half the layers on the GPU: pp512", 3000, n_prompt=512),
    Row("llama-3.1-8b", "Q4_K_M", "half the layers on the GPU: tg32", 45, n_gen=32),
)


def check_speed(report: Report, options: argparse.Namespace) -> None:
    rows = [row for row in ROWS if not options.tiny] or [
        Row("tiny", "Q4_K_M", "decode, 1 sequence", 1, n_gen=8),
        Row("tiny", "Q4_K_M", "pp64", 1, n_prompt=64),
        Row("tiny", "Q4_K_M", "decode, 4 sequences", 1, n_gen=4, depth=16, n_parallel=4),
    ]
    for model, mix in dict.fromkeys((row.model, row.mix) for row in rows):
        _measure(report, "speed", [row for row in rows if (row.model, row.mix) == (model, mix)], "all", options)


def check_offload(report: Report, options: argparse.Namespace) -> None:
    rows = HALF if not options.tiny else (Row("tiny", "Q4_K_M", "half: tg8", 1, n_gen=8),)
    _measure(report, "offload", rows, 16 if not options.tiny else 2, options)


def _measure(report: Report, section: str, rows: Sequence[Row], layers: int | str, options: argparse.Namespace) -> None:
    """All rows of one file on one open stage, each after half a second of the same work."""
    from synthetic_model import write_synthetic

    from pyinfer.graph.backend import StageConfig
    from pyinfer.quant.gguf import GGUFFile
    from pyinfer.runtime.bench import BenchRunner, BenchTest, pages_needed
    from pyinfer.runtime.load_options import LoadOptions
    from pyinfer.runtime.models.registry import build_graph
    from pyinfer.runtime.placement import place
    from pyinfer.runtime.threads import default_threads

    path = write_synthetic(Path(options.scratch) / f"{rows[0].model}-{rows[0].mix}.gguf", rows[0].model, rows[0].mix)
    tests = [BenchTest(row.n_prompt, row.n_gen, row.depth, row.n_parallel) for row in rows]
    with GGUFFile.open(path) as file:
        graph = build_graph(file)
        config = StageConfig(
            n_pages=max(pages_needed(test, 16, len(graph.kv_groups)) for test in tests),
            max_tokens=64 if options.tiny else 2048,
            max_sequences=max(test.n_parallel for test in tests),
            n_ctx=max(test.n_ctx for test in tests),
            n_threads=default_threads(),
        )
        began = time.monotonic()
        placed = place(graph, LoadOptions(n_gpu_layers=layers), lambda offload, devices: config, None)  # type: ignore[arg-type]
        report.add(section, f"{path.stem}: load", seconds=time.monotonic() - began, gpu_layers=placed.n_gpu_layers)
        try:
            for row, test in zip(rows, tests, strict=True):
                runner = BenchRunner(
                    placed.stage,
                    n_vocab=graph.n_vocab,
                    block_size=16,
                    max_tokens=config.max_tokens,
                    n_groups=len(graph.kv_groups),
                )
                until = time.monotonic() + 0.5
                while time.monotonic() < until:
                    runner.run(BenchTest(row.n_prompt, min(row.n_gen, 16), row.depth, row.n_parallel), 1)
                result = runner.run(test, options.repetitions)
                best, least = max(result.samples_ts), min(result.samples_ts)
                report.add(
                    section, f"{row.model} {row.mix}: {row.work}", tokens_per_second=result.avg_ts, least=least, most=best,
                    goal=float(row.goal), share_of_goal=result.avg_ts / row.goal,
                )  # fmt: skip
        finally:
            placed.stage.close()
