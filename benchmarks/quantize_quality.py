"""KL divergence of our quantized models and llama-quantize's from their source, over the same tokens.

python benchmarks/quantize_quality.py --quantize BIN/llama-quantize --source MODEL.gguf --types Q3_K_M,Q4_K_M
    --text TEXT [--imatrix FILE] [--chunks 4] [--results FILE.jsonl]
python benchmarks/quantize_quality.py --table FILE.jsonl

For each type both programs quantize the source, and `pyinfer` scores both files and the source on the first chunks of the
text. A ratio below 1 says that ours is nearer to the source; its standard error is over tokens (delta method, in pairs). The
last lines are means of the logarithm over all models and types: chance in single matrices is in their standard error too.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.cli.scoring import open_scorer
from pyinfer.runtime.perplexity import text_chunks

F32Array = npt.NDArray[np.float32]
F64Array = npt.NDArray[np.float64]
_N_CTX = 512
_ROWS = 32


def log_probabilities(logits: F32Array) -> F32Array:
    """float32 [n, n_vocab] of the second half of a chunk, as `pyinfer perplexity` scores it."""
    out = np.ascontiguousarray(logits[len(logits) // 2 : -1])
    for first in range(0, len(out), _ROWS):
        wide = out[first : first + _ROWS].astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        out[first : first + _ROWS] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return out


def scored(model: Path, chunks: Sequence[list[int]], threads: int) -> Iterator[F32Array]:
    with open_scorer(model, _N_CTX, threads) as llm:
        for ids in chunks:
            yield log_probabilities(llm.logits(ids))


def divergence(base: Sequence[F32Array], model: Iterator[F32Array]) -> F64Array:
    """Nats a token."""
    parts = []
    for p_all, q_all in zip(base, model, strict=True):
        for first in range(0, len(p_all), _ROWS):
            p, q = (a[first : first + _ROWS].astype(np.float64) for a in (p_all, q_all))
            parts.append(np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0))
    return np.concatenate(parts)


def compare(args: argparse.Namespace) -> None:
    chunks = chunks_of(args.source, args.text, args.chunks, args.threads)
    base = list(scored(args.source, chunks, args.threads))
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        path = Path(scratch) / "quantized.gguf"
        for kind in args.types.split(","):
            importances = ["--imatrix", str(args.imatrix)] if args.imatrix else []
            files = [str(args.source), str(path), kind]
            commands = {
                "ours": [
                    sys.executable, "-m", "pyinfer", "quantize", *files, "--allow-requantize", "-t", str(args.threads),
                    *importances,
                ],
                "peer": [args.quantize, "--allow-requantize", *importances, *files, str(args.threads)],
            }  # fmt: skip
            found = {}
            for side, command in commands.items():
                subprocess.run(command, check=True, capture_output=True)
                found[side] = divergence(base, scored(path, chunks, args.threads))
                path.unlink()
            show(
                {"model": args.source.stem, "type": kind, "imatrix": bool(args.imatrix), **ratio(**found)}, args.results
            )


def chunks_of(model: Path, text: Path, n_chunks: int, threads: int) -> list[list[int]]:
    with open_scorer(model, _N_CTX, threads) as llm:
        return text_chunks(llm.model.tokenizer, text.read_text(), _N_CTX, n_chunks)


def ratio(ours: F64Array, peer: F64Array) -> dict[str, float | int]:
    value = ours.mean() / peer.mean()
    error = (ours - value * peer).std() / math.sqrt(len(ours) - 1) / peer.mean()
    return {"ours": ours.mean(), "peer": peer.mean(), "ratio": value, "error": error, "tokens": len(ours)}


def show(row: dict[str, Any], results: Path | None) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    if results is not None:
        with results.open("a") as file:
            file.write(line + "\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, and means over its rows."""
    lines = ["| model | type | imatrix | KL ours | KL llama-quantize | ratio |", "|---|---|---|---:|---:|---:|"]
    for r in rows:
        lines.append(
            f"| {r['model']} | {r['type']} | {'yes' if r['imatrix'] else 'no'} | {r['ours']:.5f} | {r['peer']:.5f} | "
            f"{r['ratio']:.3f} ± {r['error']:.3f} |"
        )
    lines.append("")
    for title, chosen in (
        ("all", rows),
        ("without an imatrix", [r for r in rows if not r["imatrix"]]),
        ("with one", [r for r in rows if r["imatrix"]]),
        *((kind, [r for r in rows if r["type"] == kind]) for kind in dict.fromkeys(r["type"] for r in rows)),
    ):
        if len(chosen) > 1:
            logs = np.log([r["ratio"] for r in chosen])
            error = logs.std(ddof=1) / math.sqrt(len(logs))
            mean = math.exp(logs.mean())
            lines.append(f"- {title}: {mean:.3f} ± {mean * error:.3f}, {len(chosen)} rows")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantize", help="llama-quantize")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--types", default="Q2_K,Q3_K_M,Q4_K_M,Q5_K_M,Q6_K")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, help="append rows to this file")
    parser.add_argument("--scratch", type=Path, help="folder for quantized files")
    parser.add_argument("--table", type=Path, help="only print the table of such a file")
    args = parser.parse_args()
    if args.table is not None:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
    elif args.quantize and args.source and args.text:
        compare(args)
    else:
        parser.error("give --quantize, --source and --text, or --table")


if __name__ == "__main__":
    main()
