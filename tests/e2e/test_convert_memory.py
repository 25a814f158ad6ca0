"""A checkpoint of Llama-3.1-8B's shape, 16 GB of zeros that take no disk, converts in less than 2 GB of memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_checkpoint import write_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.large, pytest.mark.timeout(900)]

WIDTH, FFN, KV, VOCAB, LAYERS = 4096, 14336, 1024, 128256, 32
LIMIT = 2_000_000_000  # bytes, mapped pages of the files included


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "lm_head.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        found |= {f"{block}{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in (("q", WIDTH), ("k", KV), ("v", KV), ("o", WIDTH)):
            found[f"{block}self_attn.{name}_proj.weight"] = (rows, WIDTH)
        found |= {f"{block}mlp.{name}_proj.weight": (FFN, WIDTH) for name in ("gate", "up")}
        found[f"{block}mlp.down_proj.weight"] = (WIDTH, FFN)
    return found


def write_zeros(path: Path) -> None:
    """A safetensors file in BF16 whose tensors are a hole."""
    header, end = {}, 0
    for name, shape in shapes().items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("kind", ["bf16", "q4_k_m"])
def test_peak_memory(kind: str, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 20_000_000_000:
        pytest.skip("needs 20 GB of disk")
    folder = write_checkpoint(
        tmp_path / "hf", hidden_size=WIDTH, intermediate_size=FFN, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=LAYERS, vocab_size=VOCAB,
    )  # fmt: skip
    write_zeros(folder / "model.safetensors")
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-m", "pyinfer", "convert", str(folder), "-o", str(out), "--type", kind]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    size = out.stat().st_size if out.exists() else 0
    out.unlink(missing_ok=True)
    assert process.returncode == 0, said
    assert size > 4_000_000_000
    assert usage.ru_maxrss * 1024 < LIMIT
    print(f"{kind}: {size / 1e9:.1f} GB written, {usage.ru_maxrss * 1024 / 1e6:.0f} MB at most")
