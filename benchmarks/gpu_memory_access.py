"""What Nsight Compute's memory tables would say of every kernel, without a GPU: sectors and bank conflicts of each source line.

    python benchmarks/gpu_memory_access.py [--types Q4_K,Q6_K] [--kv f16,q8_0] [--below 0.9] [--kernel gemv] [--all-types]

One layer of Llama-3.1-8B, its rows a quarter to an eighth (`SHAPE`), runs on the emulator of compiled PTX: a prompt, steps that
decode 1 and 8 sequences, a step of both, and sampling. Every access of each kernel's first launch is counted as the hardware
would group it (tests/support/ptx_emulator/trace.cpp); races are told as well, and are what the exit status is for. Counts
do not depend on the machine that this runs on. A type takes minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402
from batches import Piece, make_batch  # noqa: E402
from ptx_emulator.trace import KernelTrace  # noqa: E402
from ptx_emulator.trace_device import TracingDevice, lines_of  # noqa: E402
from tiny_models import TinyShape, write_tiny_model  # noqa: E402

from pyinfer.graph.backend import StageConfig  # noqa: E402
from pyinfer.graph.passes import optimize  # noqa: E402
from pyinfer.graph.sampling import RowSampling  # noqa: E402
from pyinfer.kernels_gpu.launch import Kernel  # noqa: E402
from pyinfer.kernels_gpu.sample import DeviceSampler  # noqa: E402
from pyinfer.kernels_gpu.stage import GPUStage  # noqa: E402
from pyinfer.kernels_gpu.weights_layout import KINDS  # noqa: E402
from pyinfer.quant.gguf import GGUFFile  # noqa: E402
from pyinfer.runtime.models.registry import build_graph  # noqa: E402

SHAPE = TinyShape(n_layers=1, n_embd=4096, n_ff=1792, n_heads=8, n_kv_heads=2, head_dim=128, n_ctx=1024)
SMS, N_SEQUENCES, PROMPT, N_VOCAB = 16, 8, 160, 32000
BLOCK = 16

Traces = dict[Kernel, list[KernelTrace]]


def trace_model(
    kind: str, kv_dtype: str, shape: TinyShape = SHAPE, arch: str = "llama", prompt: int = PROMPT
) -> TracingDevice:
    """A prompt, two steps that decode and one of both, with all matrices of one type."""
    device = TracingDevice(n_sms=SMS, n_bytes=4 << 30)
    pages = prompt // BLOCK + 2
    config = StageConfig(
        n_pages=N_SEQUENCES * pages, block_size=BLOCK, max_tokens=max(prompt, 64), max_sequences=N_SEQUENCES,
        n_ctx=shape.n_ctx, kv_dtype=kv_dtype,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_model(Path(folder) / "model.gguf", arch, kind, shape=shape)
        stage = GPUStage(device, optimize(build_graph(GGUFFile.open(path))), config)
        ids = np.random.RandomState(1).randint(0, 256, prompt).tolist()
        own = [list(range(i * pages, (i + 1) * pages)) for i in range(N_SEQUENCES)]
        stage.run(make_batch([Piece(ids, own[0])], BLOCK, [prompt - 1]))
        for n in (1, N_SEQUENCES):
            stage.run(make_batch([Piece(ids[:1], own[i], prompt) for i in range(n)], BLOCK))
        pieces = [Piece(ids[:1], own[0], prompt + 1), Piece(ids[: prompt // 2], own[1])]
        stage.run(make_batch(pieces, BLOCK, [0, prompt // 2]))
        stage.close()
    return device


def trace_sampling(n_vocab: int = N_VOCAB) -> TracingDevice:
    """Rows with every filter, and logprobs."""
    device = TracingDevice(always=True)
    rows = [
        RowSampling(row=0, temperature=0.8, top_k=40, top_p=0.95, number=0.3, n_logprobs=5),
        RowSampling(row=1, temperature=0.8, number=0.6),
    ]
    logits = device.array(np.random.RandomState(1).normal(0, 3, (2, n_vocab)).astype(np.float32))
    DeviceSampler(device, n_vocab, len(rows)).start(logits, n_vocab, rows)
    device.close()
    return device


def print_tables(device: TracingDevice, only: Sequence[str], below: float) -> None:
    """Lines that do more than 1 / `below` of what they must."""
    for kernel, traces in device.traces.items():
        if only and not any(name in kernel.name for name in only):
            continue
        for trace in traces:
            table = trace.table(lines_of(kernel, device.arch), below=below)
            if table:
                print(f"\n### {kernel}, grid {trace.grid} x {trace.threads}\n\n{table}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="Q4_K,Q6_K,Q8_0", help="of the weights")
    parser.add_argument("--all-types", action="store_true")
    parser.add_argument("--kv", default="f16", help="types of keys and values, each with the first type of weights")
    parser.add_argument("--kernel", default="", help="only kernels whose names contain one of these")
    parser.add_argument("--below", type=float, default=1.01, help="only lines of less efficiency; default: all")
    options = parser.parse_args()
    types = list(KINDS) if options.all_types else options.types.split(",")
    kv_types = options.kv.split(",")
    pairs = [(kind, kv_types[0]) for kind in types] + [(types[0], kv) for kv in kv_types[1:]]
    only = [name for name in options.kernel.split(",") if name]
    races: list[str] = []
    for kind, kv in pairs:
        print(f"\n## {kind}, keys and values {kv}", flush=True)
        device = trace_model(kind, kv)
        print_tables(device, only, options.below)
        races += device.races()
    if not only or any("sample" in name or "logprobs" in name for name in only):
        print("\n## sampling", flush=True)
        device = trace_sampling()
        print_tables(device, only, options.below)
        races += device.races()
    print("\n## races\n\n" + ("\n".join(races) or "none"))
    return 1 if races else 0


if __name__ == "__main__":
    sys.exit(main())
