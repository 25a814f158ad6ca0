"""Sections of `gpu_check.py` over whole models: the GPU's tokens against the CPU's, and many streams for a while."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

from gpu_report import Report

SYNTHETIC = (("llama-3.2-1b", "Q4_K_M"), ("llama-3.2-1b", "Q8_0"), ("llama-3.1-8b", "Q4_K_M"))


def check_models(report: Report, options: argparse.Namespace) -> None:
    for name, mix in SYNTHETIC if not options.tiny else (("tiny", "Q4_K_M"),):
        _compare_logits(report, options, name, mix)
    for path in options.models:
        for layers in ("all", "half"):
            _compare(report, Path(path), layers)


def _compare_logits(report: Report, options: argparse.Namespace, name: str, mix: str) -> None:
    """A prompt, then one token more: all logits, by kernels for many rows and by those for one."""
    import numpy as np
    from batches import Piece, make_batch
    from synthetic_model import write_synthetic

    from pyinfer.graph.backend import StageConfig
    from pyinfer.quant.gguf import GGUFFile
    from pyinfer.runtime.load_options import LoadOptions
    from pyinfer.runtime.models.registry import build_graph
    from pyinfer.runtime.placement import place
    from pyinfer.runtime.threads import default_threads

    path = write_synthetic(Path(options.scratch) / f"{name}-{mix}.gguf", name, mix)
    n = 16 if options.tiny else 100
    config = StageConfig(n_pages=8, max_tokens=128, max_sequences=1, n_ctx=128, n_threads=default_threads())
    found = []
    with GGUFFile.open(path) as file:
        graph = build_graph(file)
        ids = np.random.default_rng(options.seed).integers(0, graph.n_vocab, n + 1).tolist()
        pages = list(range(config.n_pages))
        for layers in (0, "all"):
            placed = place(graph, LoadOptions(n_gpu_layers=layers), lambda offload, devices: config, None)
            try:
                prompt = placed.stage.run(make_batch([Piece(ids[:n], pages, 0)], 16)).copy()
                found.append((prompt, placed.stage.run(make_batch([Piece(ids[n:], pages, n)], 16)).copy()))
            finally:
                placed.stage.close()
    for what, host, device in zip((f"{n} tokens", "one token more"), *found, strict=True):
        error = float(np.abs(host - device).max() / np.abs(host).max())
        report.add("models", f"{path.stem}: {what}", kl_mean=float(_kl(host, device).mean()), error=error)


def _compare(report: Report, path: Path, layers: str) -> None:
    import numpy as np

    from pyinfer import LLM, SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time"]
    with LLM(path, n_ctx=512, max_num_seqs=8) as cpu:
        n_blocks = len(cpu.model.graph.kv_layers)
        expected = cpu.generate(prompts, greedy, use_tqdm=False)
        ids = [[*each.prompt_token_ids, *each.outputs[0].token_ids] for each in expected]
        host = cpu.logits(ids)
    with LLM(path, n_ctx=512, max_num_seqs=8, n_gpu_layers="all" if layers == "all" else n_blocks // 2) as gpu:
        found = gpu.generate(prompts, greedy, use_tqdm=False)
        device = gpu.logits(ids)
    kl = [_kl(a, b) for a, b in zip(host, device, strict=True)]
    error = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(host, device, strict=True))
    report.add("models", f"{path.name}, {layers}", kl_mean=float(np.mean(np.concatenate(kl))), error=error)
    for before, after, rows, logits in zip(expected, found, host, device, strict=True):
        a, b, n = before.outputs[0].token_ids, after.outputs[0].token_ids, len(before.prompt_token_ids)
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if first is None:
            report.add("models", f"{path.name}, {layers}: 32 tokens", same=True)
            continue
        row, other = rows[n + first - 1], logits[n + first - 1]
        gaps = {"gap_cpu": float(row[a[first]] - row[b[first]]), "gap_gpu": float(other[b[first]] - other[a[first]])}
        report.add("models", f"{path.name}, {layers}: 32 tokens", same=False, first_difference=first, **gaps)


def _kl(host: Any, device: Any) -> Any:
    import numpy as np

    def logprobs(x: Any) -> Any:
        shifted = x.astype(np.float64) - x.max(1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))

    p, q = logprobs(host), logprobs(device)
    return (np.exp(p) * (p - q)).sum(1)


def check_soak(report: Report, options: argparse.Namespace) -> None:
    """Streams of random prompts come and go; every request must end by itself and every page come back."""
    from synthetic_model import write_synthetic

    from pyinfer.quant.gguf import GGUFFile
    from pyinfer.runtime.backends import gpus
    from pyinfer.runtime.load_options import load_options
    from pyinfer.runtime.loader import open_engine
    from pyinfer.runtime.sampling_params import SamplingParams
    from pyinfer.runtime.vocabulary_facts import VocabularyFacts

    name = "tiny" if options.tiny else "llama-3.2-1b"
    path = write_synthetic(Path(options.scratch) / f"{name}-Q4_K_M.gguf", name, "Q4_K_M")
    chosen = load_options({"n_gpu_layers": "all", "max_num_seqs": 64, "n_ctx": 2048, "kv_cache_memory": 1 << 30})
    with GGUFFile.open(path) as file:
        engine = open_engine(file, chosen, lambda: VocabularyFacts(4096, frozenset()), None).engine
        try:
            number, n_tokens, failures, free = 0, 0, 0, 0
            dice = random.Random(options.seed)
            began = now = time.monotonic()
            while (now := time.monotonic()) < began + options.soak_seconds or engine.has_work:
                while engine.stats().running + engine.stats().waiting < 64 and now < began + options.soak_seconds:
                    params = SamplingParams(
                        max_tokens=dice.randint(8, 200),
                        temperature=dice.choice([0.0, 0.8]),
                        top_k=40,
                        top_p=0.95,
                        seed=number,
                    )
                    engine.add_request(str(number), [dice.randrange(4096) for _ in range(dice.randint(1, 600))], params)
                    number += 1
                outputs = engine.step()
                n_tokens += sum(len(output.new_token_ids) for output in outputs)
                failures += sum(output.failure is not None for output in outputs)
                if not free and now > began + options.soak_seconds / 2:
                    free = gpus()[0].free
            engine.check()
            report.add(
                "soak", f"64 streams for {options.soak_seconds:.0f} s", requests=number, failures=failures, tokens=n_tokens,
                tokens_per_second=n_tokens / (now - began), pages_held=engine.stats().pages_used,
                grown_mib=(free - gpus()[0].free) / 2**20,
            )  # fmt: skip
        finally:
            engine.close()
