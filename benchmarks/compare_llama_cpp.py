"""Every goal against llama.cpp in one command: decode, prompts, depth and batches, with the ratio that each is held to.

    python benchmarks/compare_llama_cpp.py --rounds 3 --json results.json --write
    python benchmarks/compare_llama_cpp.py --plot results.json docs/speed.svg

llama.cpp is built first unless it is there. The sides run one right after the other on the same file and threads, the first
side changing from round to round, a read loop before and after each pair; llama.cpp runs with `-fa 1`, its faster setting
here. Medians of the rounds in which both read loops of two threads reached 50 GB/s, or of all where there is none: the goal
of two-thread decode is lower there. `--write` puts the table into RESULTS.md. Models that no registry carries are named by
path: `llama-3.2-1b-q4_k_m=PATH`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from build_peer import TARGETS, BuildError, build
from machine_state import describe_machine
from pairs import Row, run_json, run_round, table

from pyinfer.errors import PyinferError
from pyinfer.runtime.hub import resolve

GROUPS = ("decode", "prompt", "batch", "depth")
BATCHES = {1: 1.0, 4: 3.0, 8: 3.5, 16: 2.3, 32: 2.0}  # sequences: goal
BATCH_PROMPT, BATCH_GEN = 32, 32  # tokens of each sequence in a batched run
SLOW_GOAL = 1.1  # of two-thread decode while memory is slow
LARGE = ("qwen2.5-coder-1.5b", "llama-3.2-1b-q4_k_m")  # the models with goals for batches and depth
RESULTS = Path(__file__).with_name("RESULTS.md")
BEGIN, END = "<!-- compare_llama_cpp.py begins -->", "<!-- compare_llama_cpp.py ends -->"


@dataclass(frozen=True)
class Case:
    """One pair of commands; both print JSON. `goal` is the least ratio wanted."""

    group: str
    model: str
    threads: int
    test: str
    n_prompt: int
    n_gen: int
    goal: float
    depth: int = 0
    batch: int = 1

    def row(self, path: Path) -> Row:
        is_decode = self.n_gen > 0 and self.batch == 1
        slow = min(self.goal, SLOW_GOAL) if is_decode and self.threads > 1 else self.goal
        reads_file = self.group == "decode" and self.threads > 1
        return Row(self.model, self.threads, self.test, self.goal, slow, path.stat().st_size if reads_file else None)

    def ours(self, path: Path) -> float:
        command = [
            *(sys.executable, "-m", "pyinfer", "bench", str(path), "-r", "1", "-o", "json", "-t", str(self.threads)),
            *("-p", str(self.n_prompt), "-n", str(self.n_gen), "-d", str(self.depth), "-B", str(self.batch)),
        ]
        return float(run_json(command)[0]["samples_ts"][0])

    def peers(self, folder: Path, path: Path) -> float:
        shared = ["-m", str(path), "-t", str(self.threads)]
        if self.group == "batch":
            context = max(512, self.batch * (BATCH_PROMPT + BATCH_GEN))
            command = [
                *(str(folder / "llama-batched-bench"), *shared, "-fa", "on", "-c", str(context)),
                *("-npp", str(BATCH_PROMPT), "-ntg", str(BATCH_GEN), "-npl", str(self.batch)),
                *("--output-format", "jsonl"),
            ]
            return float(run_json(command)[0]["speed_tg"])
        command = [
            *(str(folder / "llama-bench"), *shared, "-r", "1", "-o", "json", "-fa", "1"),
            *("-p", str(self.n_prompt), "-n", str(self.n_gen), "-d", str(self.depth)),
        ]
        return float(run_json(command)[0]["samples_ts"][0])


def cases(
    groups: Sequence[str], models: Sequence[str], threads: Sequence[int], depths: Sequence[int]
) -> Iterator[Case]:
    for model in models:
        most, is_large = max(threads), model in LARGE
        for n in threads:
            if "decode" in groups:
                yield Case("decode", model, n, "tg128", 0, 128, (1.4 if n > 1 else 1.2) if is_large else 1.25)
            if "prompt" in groups:
                yield Case("prompt", model, n, "pp512", 512, 0, 5.0 if model == "smollm2" else 2.0)
        if "prompt" in groups:
            yield Case("prompt", model, most, "pp2048", 2048, 0, 2.0)
        if "batch" in groups and is_large:
            for batch, goal in BATCHES.items():
                yield Case("batch", model, most, f"{batch} sequences", 0, BATCH_GEN, goal, BATCH_PROMPT, batch)
        if "depth" in groups and is_large:
            for depth in depths:
                yield Case("depth", model, most, f"tg32 @ d{depth}", 0, 32, 1.4, depth)
                yield Case("depth", model, most, f"pp256 @ d{depth}", 256, 0, 1.0, depth)


def measure(case: Case, path: Path, peer: Path, arguments: argparse.Namespace) -> Row:
    row = case.row(path)
    for _ in range(arguments.rounds):
        run_round(row, lambda: case.ours(path), lambda: case.peers(peer, path), arguments.wait_idle)
    return row


def write_results(text: str) -> None:
    """Puts a section between its marks in RESULTS.md."""
    page = RESULTS.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    RESULTS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def section(rows: Sequence[tuple[Case, Row]], arguments: argparse.Namespace) -> str:
    """What was measured, where and by which command, as Markdown."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    models = [re.sub(r"=.*", "=FILE", name) for name in arguments.models]
    command = f"python benchmarks/compare_llama_cpp.py --groups {' '.join(arguments.groups)} --threads "
    command += f"{' '.join(map(str, arguments.threads))} --rounds {arguments.rounds} --models {' '.join(models)}"
    missed = [f"{r.model} -t {r.threads} {r.test} {r.ratio:.2f} of {r.wanted}" for _, r in rows if r.ratio < r.wanted]
    return (
        f"{datetime.date.today()}, commit {commit.stdout.strip() or 'unknown'}, {describe_machine()}; llama.cpp of "
        f"llama-cpp-python 0.3.36, native build, `-fa 1`; {arguments.rounds} rounds.\n\n```\n{command}\n```\n\n"
        f"{table([row for _, row in rows])}\n\nGoals missed: {'; '.join(missed) or 'none'}."
    )


def plot(results: Path, target: Path) -> None:
    """Speed against batch and depth, decode and prompts, ours and llama.cpp's, for each large model."""
    import matplotlib.pyplot as plt

    data = json.loads(results.read_text())["rows"]
    panels = (
        ("batch", "tg", "sequences at once", "tokens/s, all sequences"),
        ("depth", "tg", "tokens in the cache", "decode, tokens/s"),
        ("depth", "pp", "tokens in the cache", "prompt, tokens/s"),
    )
    chosen = [(panel, _points(data, panel[0], panel[1])) for panel in panels]
    chosen = [(panel, points) for panel, points in chosen if points]
    figure, axes = plt.subplots(1, len(chosen), figsize=(5 * len(chosen), 4), squeeze=False)
    for axis, ((_, _, x_label, y_label), points) in zip(axes[0], chosen, strict=True):
        for model in sorted({model for model, *_ in points}):
            mine = sorted(point[1:] for point in points if point[0] == model)
            for i, (side, style) in enumerate((("pyinfer", "-o"), ("llama.cpp", "--s")), 1):
                axis.plot([p[0] for p in mine], [p[i] for p in mine], style, label=f"{model}, {side}")
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target)


def _points(data: list[dict[str, object]], group: str, kind: str) -> list[tuple[str, int, float, float]]:
    """(model, x, ours, llama.cpp's) of a panel; two-thread rows without depth stand at 0."""
    found = []
    for row in data:
        case = row["case"]
        assert isinstance(case, dict)
        at_zero = group == "depth" and case["model"] in LARGE and case["test"] in ("tg128", "pp512")
        if group == "batch":
            is_in = case["group"] == "batch"
        else:
            is_in = case["threads"] > 1 and (case["group"] == "depth" or at_zero) and case["test"].startswith(kind)
        if is_in:
            found.append((case["model"], case["batch" if group == "batch" else "depth"], row["ours"], row["peers"]))
    return found  # type: ignore[return-value]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="pyinfer and llama.cpp in turn, with the goals.")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument(
        "--models", nargs="+", default=["smollm2", "gemma3-270m", "qwen2.5-coder-1.5b"], help="names, or NAME=PATH"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--depths", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--peer", type=Path, help="folder with llama.cpp's programs (default: what build_peer.py builds)"
    )
    parser.add_argument("--wait-idle", type=float, default=0, metavar="SECONDS", help="before a pair, at most so long")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("RESULTS", "SVG"), help="only draw earlier results")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.plot:
        plot(*arguments.plot)
        return 0
    rows: list[tuple[Case, Row]] = []
    try:
        peer = arguments.peer or build(list(TARGETS), 2)
        paths = {
            name: Path(path) if path else resolve(name)
            for name, _, path in (m.partition("=") for m in arguments.models)
        }
        for case in cases(arguments.groups, list(paths), arguments.threads, arguments.depths):
            row = measure(case, paths[case.model], peer, arguments)
            rows.append((case, row))
            print(
                f"{row.model} -t {row.threads} {row.test}: {row.ratio:.2f} of {row.wanted}", file=sys.stderr, flush=True
            )
    except (PyinferError, BuildError, RuntimeError, OSError) as error:
        print(f"compare_llama_cpp: {error}", file=sys.stderr)
        return 1
    finally:
        if rows:
            print(section(rows, arguments))
            if arguments.json:
                found = [
                    {"case": asdict(c), "ours": r.median("ours"), "peers": r.median("peers"), "ratio": r.ratio}
                    for c, r in rows
                ]
                arguments.json.write_text(json.dumps({"machine": describe_machine(), "rows": found}, indent=1) + "\n")
    if arguments.write:
        write_results(section(rows, arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
