"""How `pyinfer bench` prints its results: a table as llama-bench's, JSON and CSV with its keys."""

from __future__ import annotations

import csv
import datetime
import json
import sys
from abc import ABC, abstractmethod
from typing import Any

import pyinfer
from pyinfer.cli.options import EngineOptions
from pyinfer.cli.text import safe
from pyinfer.graph.backend import split_kv_dtype
from pyinfer.runtime.bench import BenchResult
from pyinfer.runtime.cpu import cpu_name
from pyinfer.runtime.model_info import ModelInfo
from pyinfer.runtime.sizes import format_binary


class Printer(ABC):
    """Gets the results one by one; each kind prints as early as its format allows."""

    def __init__(self, info: ModelInfo, engine: EngineOptions, n_threads: int) -> None:
        self.info, self.engine, self.n_threads = info, engine, n_threads

    @abstractmethod
    def add(self, result: BenchResult) -> None:
        """The next result."""

    @abstractmethod
    def end(self) -> None:
        """After the last result."""

    def record(self, result: BenchResult) -> dict[str, Any]:
        """One test with llama-bench's keys; `n_parallel` and `test` are ours."""
        test, info = result.test, self.info
        return {
            "pyinfer_version": pyinfer.__version__,
            "cpu_info": cpu_name(),
            "backends": "CUDA" if self.engine.n_gpu_layers else "CPU",
            "model_filename": str(info.path),
            "model_type": info.model_type,
            "model_size": info.tensor_bytes,
            "model_n_params": info.n_params,
            "n_batch": self.engine.max_num_batched_tokens,
            "n_threads": self.n_threads,
            "type_k": split_kv_dtype(self.engine.kv_cache_dtype)[0],
            "type_v": split_kv_dtype(self.engine.kv_cache_dtype)[1],
            "n_gpu_layers": self.engine.n_gpu_layers,
            "test": test.name,
            "n_prompt": test.n_prompt,
            "n_gen": test.n_gen,
            "n_depth": test.n_depth,
            "n_parallel": test.n_parallel,
            "test_time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "avg_ns": round(result.avg_ns),
            "stddev_ns": round(result.stddev_ns),
            "avg_ts": round(result.avg_ts, 6),
            "stddev_ts": round(result.stddev_ts, 6),
            "samples_ns": list(result.samples_ns),
            "samples_ts": [round(ts, 6) for ts in result.samples_ts],
        }


class MarkdownPrinter(Printer):
    """llama-bench's table; a row appears as soon as its test is done."""

    def __init__(self, info: ModelInfo, engine: EngineOptions, n_threads: int) -> None:
        super().__init__(info, engine, n_threads)
        self._started = False

    def add(self, result: BenchResult) -> None:
        if not self._started:
            self._started = True
            self._row(("model", "size", "params", "backend", "threads", "seqs", "test", "t/s"))
            print("|" + "|".join(" " + "-" * (w - 1) + (":" if right else "-") + " " for w, right in _COLUMNS) + "|")
        n_params = self.info.n_params
        params = f"{n_params / 1e9:.2f} B" if n_params >= 1e9 else f"{n_params / 1e6:.2f} M"
        self._row(
            (
                safe(self.info.model_type),
                format_binary(self.info.tensor_bytes),
                params,
                f"CUDA {self.engine.n_gpu_layers}" if self.engine.n_gpu_layers else "CPU",
                str(self.n_threads),
                str(result.test.n_parallel),
                result.test.name,
                f"{result.avg_ts:.2f} ± {result.stddev_ts:.2f}",
            )
        )

    def _row(self, cells: tuple[str, ...]) -> None:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, (width, right) in zip(cells, _COLUMNS, strict=True)
        )
        print("| " + " | ".join(padded) + " |", flush=True)

    def end(self) -> None:
        print(f"\npyinfer {pyinfer.__version__}, KV cache {self.engine.kv_cache_dtype}")


# width and whether the column is aligned to the right
_COLUMNS = ((30, False), (10, True), (10, True), (10, False), (7, True), (4, True), (15, True), (20, True))


class JsonPrinter(Printer):
    """A list of objects, printed whole so that the output is JSON or nothing."""

    def __init__(self, info: ModelInfo, engine: EngineOptions, n_threads: int) -> None:
        super().__init__(info, engine, n_threads)
        self._records: list[dict[str, Any]] = []

    def add(self, result: BenchResult) -> None:
        self._records.append(self.record(result))

    def end(self) -> None:
        print(json.dumps(self._records, indent=2))


class CsvPrinter(Printer):
    """One line a test; without the single samples, as in llama-bench."""

    def __init__(self, info: ModelInfo, engine: EngineOptions, n_threads: int) -> None:
        super().__init__(info, engine, n_threads)
        self._writer: csv.DictWriter[str] | None = None

    def add(self, result: BenchResult) -> None:
        record = {k: v for k, v in self.record(result).items() if not k.startswith("samples_")}
        if self._writer is None:
            self._writer = csv.DictWriter(sys.stdout, record.keys(), lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow(record)

    def end(self) -> None:
        sys.stdout.flush()


PRINTERS: dict[str, type[Printer]] = {"md": MarkdownPrinter, "json": JsonPrinter, "csv": CsvPrinter}
