"""Every goal against llama.cpp in one command: decode, prompts, depth and batches, with the ratio that each is held to.

    python benchmarks/build_peer.py
    python benchmarks/compare_llama_cpp.py --groups decode prompt batch depth --rounds 2 --json results.json
    python benchmarks/compare_llama_cpp.py --plot results.json docs/speed.svg

The sides run one right after the other on the same file and threads, a read loop beside each pair, the first side
changing from round to round; llama.cpp runs with `-fa 1`, its faster setting here. Medians of all rounds. Models that no
registry carries are named by path: `llama-3.2-1b-q4_k_m=PATH`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from build_peer import binary_folder
from machine_state import CpuClock, bandwidth, describe_machine, wait_until_idle
from versus_llamacpp import Row, print_table, run_json

from pyinfer.runtime.hub import resolve

GROUPS = ("decode", "prompt", "batch", "depth")
BATCHES = (1, 4, 8, 16, 32)
BATCH_PROMPT, BATCH_GEN = 32, 32  # tokens of each sequence in a batched run
LARGE = ("qwen2.5-coder-1.5b", "llama-3.2-1b-q4_k_m")  # the models with goals for batches and depth


@dataclass(frozen=True)
class Case:
    """One pair of commands; both print JSON. `goal` is the least ratio wanted."""

    group: str
    model: str
    threads: int
    test: str
    n_prompt: int
    n_gen: int
    depth: int = 0
    batch: int = 1
    goal: float = 1.0

    def ours(self, path: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "pyinfer", "bench", str(path), "-r", "1", "-o", "json", "-t", str(self.threads)),
            *("-p", str(self.n_prompt), "-n", str(self.n_gen), "-d", str(self.depth), "-B", str(self.batch)),
        ]

    def peers(self, folder: Path, path: Path) -> list[str]:
        if self.group == "batch":
            context = self.batch * (BATCH_PROMPT + BATCH_GEN)
            return [
                *(str(folder / "llama-batched-bench"), "-m", str(path), "-t", str(self.threads), "-fa", "on"),
                *("-c", str(max(512, context)), "-npp", str(BATCH_PROMPT), "-ntg", str(BATCH_GEN)),
                *("-npl", str(self.batch), "--output-format", "jsonl"),
            ]
        return [
            *(str(folder / "llama-bench"), "-m", str(path), "-r", "1", "-o", "json", "-t", str(self.threads)),
            *("-p", str(self.n_prompt), "-n", str(self.n_gen), "-d", str(self.depth), "-fa", "1"),
        ]


def cases(
    groups: Sequence[str], models: Sequence[str], threads: Sequence[int], depths: Sequence[int]
) -> Iterator[Case]:
    for model in models:
        for n in threads:
            if "decode" in groups:
                goal = (1.4 if n > 1 else 1.2) if model in LARGE else 1.25
                yield Case("decode", model, n, "tg128", 0, 128, goal=goal)
            if "prompt" in groups:
                yield Case("prompt", model, n, "pp512", 512, 0, goal=5.0 if model == "smollm2" else 2.0)
        if "prompt" in groups:
            yield Case("prompt", model, max(threads), "pp2048", 2048, 0, goal=2.0)
        if "batch" in groups and model in LARGE:
            for batch in BATCHES:
                goal = {4: 3.0, 8: 3.5, 16: 2.3, 32: 2.0}.get(batch, 1.4)
                name = f"{batch} sequences"
                yield Case("batch", model, max(threads), name, 0, BATCH_GEN, BATCH_PROMPT, batch, goal)
        if "depth" in groups and model in LARGE:
            for depth in depths:
                yield Case("depth", model, max(threads), f"tg32 @ d{depth}", 0, 32, depth, goal=1.4)


def samples(case: Case, side: str, command: list[str]) -> list[float]:
    """Tokens per second of one run."""
    if case.group == "batch" and side == "peers":
        lines = run_lines(command)
        return [float(line["speed_tg"]) for line in lines]
    return [float(value) for result in run_json(command) for value in result["samples_ts"]]


def run_lines(command: list[str]) -> list[dict[str, Any]]:
    import subprocess

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not found:
        raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-500:]}")
    return found


def measure(case: Case, folder: Path, path: Path, rounds: int, idle: float) -> Row:
    row = Row(case.model, case.threads, case.test)
    pair = [("ours", case.ours(path)), ("peers", case.peers(folder, path))]
    for number in range(rounds):
        if idle:
            wait_until_idle(idle)
        row.bandwidths.append(bandwidth(case.threads))
        start = CpuClock.now()
        for side, command in pair if number % 2 == 0 else pair[::-1]:
            getattr(row, side).extend(samples(case, side, command))
        row.others.append(CpuClock.now().others_since(start))
    print(
        f"{case.model} -t {case.threads} {case.test}: ratio {row.ratio:.2f}, goal {case.goal}",
        file=sys.stderr,
        flush=True,
    )
    return row


def plot(results: Path, target: Path) -> None:
    """Decode speed against batch and depth, ours and llama.cpp's, for each large model."""
    import matplotlib.pyplot as plt

    data = json.loads(results.read_text())["rows"]
    labels = {"batch": "sequences at once", "depth": "tokens in the cache"}
    groups = [group for group in labels if any(r["case"]["group"] == group for r in data)]
    figure, axes = plt.subplots(1, len(groups), figsize=(5 * len(groups), 4), squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        for model in sorted({r["case"]["model"] for r in data if r["case"]["group"] == group}):
            chosen = [r for r in data if r["case"]["model"] == model and r["case"]["group"] == group]
            if group == "depth":
                chosen += [
                    r
                    for r in data
                    if r["case"]["model"] == model and r["case"]["test"] == "tg128" and r["case"]["threads"] > 1
                ]
            key = "batch" if group == "batch" else "depth"
            chosen.sort(key=lambda r: r["case"][key])
            xs = [r["case"][key] for r in chosen]
            for side, style in (("ours", "-o"), ("peers", "--s")):
                name = "pyinfer" if side == "ours" else "llama.cpp"
                axis.plot(xs, [r[side] for r in chosen], style, label=f"{model}, {name}")
        axis.set_xlabel(labels[group])
        axis.set_ylabel("tokens/s, all sequences")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="pyinfer and llama.cpp in turn, with the goals.")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument(
        "--models", nargs="+", default=["smollm2", "gemma3-270m", "qwen2.5-coder-1.5b"], help="names, or NAME=PATH"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--depths", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer", type=Path, default=binary_folder(), help="folder with llama.cpp's programs")
    parser.add_argument("--wait-idle", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("RESULTS", "SVG"), help="only draw earlier results")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.plot:
        plot(*arguments.plot)
        return 0
    if not (arguments.peer / "llama-bench").is_file():
        print(f"compare_llama_cpp: no llama-bench in {arguments.peer}; run benchmarks/build_peer.py", file=sys.stderr)
        return 1
    paths = {name.partition("=")[0]: name.partition("=")[2] for name in arguments.models}
    rows: list[tuple[Case, Row]] = []
    try:
        for case in cases(arguments.groups, list(paths), arguments.threads, arguments.depths):
            path = Path(paths[case.model]) if paths[case.model] else resolve(case.model)
            rows.append((case, measure(case, arguments.peer, path, arguments.rounds, arguments.wait_idle)))
    finally:
        print(f"{describe_machine()}; llama.cpp of llama-cpp-python 0.3.36, native build, -fa 1\n")
        print_table([row for _, row in rows])
        missed = [f"{c.model} -t {c.threads} {c.test}: {r.ratio:.2f} of {c.goal}" for c, r in rows if r.ratio < c.goal]
        print("\ngoals missed: " + ("; ".join(missed) if missed else "none"))
        if arguments.json:
            import statistics

            found = [
                {
                    "case": asdict(c),
                    "ours": statistics.median(r.ours),
                    "peers": statistics.median(r.peers),
                    "ratio": r.ratio,
                }
                for c, r in rows
                if r.ours and r.peers
            ]
            arguments.json.write_text(json.dumps({"machine": describe_machine(), "rows": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
