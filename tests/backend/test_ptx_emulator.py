"""What the PTX emulator must refuse, and our kernels on it as NVRTC compiles them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_emulator.build import EmulatorError, has_compiler
from ptx_emulator.device import PTXDevice
from ptx_emulator.parse import PTXError
from ptx_snippets import Run, running, snippet

from pyinfer.errors import BackendError
from pyinfer.kernels_gpu.launch import Kernel, Launch
from pyinfer.kernels_gpu.nvrtc import load_nvrtc

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="there is no g++")]
HERE = Path(__file__).parent


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with running(tmp_path) as call:
        yield call


@pytest.mark.parametrize(
    "body, message",
    [
        ("  tensormap.replace %r1;", r"line 20: an unknown instruction in `tensormap\.replace"),
        ("  add.u128 %r2, %r1, %r1;", "line 20: an unknown type"),
        ("  add.wrong.f32 %f1, %f1, %f1;", r"line 20: an unknown modifier \.wrong"),
        ("  mov.u32 %r2, %clock;", "line 20: an unknown operand '%clock'"),
        ("  mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%r2,%r3}, {%r4,%r5}, {%r8}, {%r2,%r3};", "unknown mma"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_an_error(run: Run, body: str, message: str) -> None:
    with pytest.raises(PTXError, match=message):
        run(body)


MISUSE = [
    ("  ld.global.v4.u32 {%r2,%r3,%r4,%r5}, [%rd1+4];", "a misaligned access.*line 20 of the PTX: ld.global.v4"),
    ("  st.global.u32 [%rd2+64], %r1;\n  st.global.u32 [%rd2+1024], %r1;", "at byte 2048 of a buffer of 2048 bytes"),
    ("  mov.u32 %r2, tile;\n  st.shared.u32 [%r2+2048], %r1;", "shared address .* out of the bounds"),
    ("  mov.u64 %rd5, 64;\n  ld.global.u32 %r2, [%rd5];", "near no buffer"),
    ("  setp.lt.u32 %p1, %r1, 5;\n  @%p1 bar.warp.sync -1;\n  @%p1 ret;\n  bar.warp.sync 0xff;", "lanes came with different"),
    ("  setp.lt.u32 %p1, %r1, 5;\n  @%p1 bra A;\n  bar.sync 0;\n  bra B;\nA:\n  bar.sync 0;\nB:", "different barriers, of lines"),
    ("  mov.u32 %r3, 0;\n  div.s32 %r2, %r1, %r3;", "division by zero"),
]  # fmt: skip


@pytest.mark.parametrize("body, message", MISUSE)
def test_misuse_is_found(run: Run, body: str, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        run(body)


def test_an_overlapping_kernel_waits_before_it_touches_what_others_write(tmp_path: Path) -> None:
    read, write = "  ld.global.u32 %r2, [%rd1];\n", "  st.global.u32 [%rd2], %r1;\n"
    wait, start = "  griddepcontrol.wait;\n", "  griddepcontrol.launch_dependents;\n"
    texts = {
        "early": read + wait + write,
        "late": wait + read + write,
        "late, opens early": start + wait + read + write,
        "writes": write + wait,
        "never": read,
        "read only": wait + write + "  ld.global.nc.u32 %r2, [%rd2];\n",
    }
    for name, body in texts.items():
        (tmp_path / f"{name}.ptx").write_text(snippet(body))
    device = PTXDevice()
    a, b, d, e = (device.array(np.zeros((32, 16), np.uint32)) for _ in range(4))

    def launch(name: str, source: Any, target: Any, overlap: bool = True) -> None:
        kernel = Kernel(str(tmp_path / f"{name}.ptx"), "test")
        device.launch(Launch(kernel, (1, 1, 1), (32, 1, 1), (source, target), overlap=overlap))

    launch("late", a, b)
    launch("early", a, d)  # nobody writes what it reads
    launch("late", a, b)
    launch("late", a, e)
    launch("early", b, d)  # starts when the one before it has waited for what wrote b
    for between in ("late", "late, opens early"):
        launch(between, a, b)
        if between != "late":
            launch(between, a, e)
        with pytest.raises(EmulatorError, match=r"a read of what an earlier kernel writes before griddepcontrol\.wait"):
            launch("early", b, d)
    launch("early", b, d, overlap=False)
    with pytest.raises(EmulatorError, match=r"a write to global memory before griddepcontrol\.wait"):
        launch("writes", a, b)
    with pytest.raises(EmulatorError, match="no thread has waited"):
        launch("never", a, b)
    with pytest.raises(EmulatorError, match=r"ld\.global\.nc of what this kernel writes"):
        launch("read only", a, b)
    device.close()


# ---- what NVRTC makes of our sources: the tests of the kernels on it
SOME = (
    "test_gpu_matmul.py::test_every_type[Q4_K]",
    "test_gpu_attention.py::test_decode_with_rope_and_store[norms]",
    "test_gpu_attention.py::test_prompt[continued]",
)


def _pytest(arch: int, *arguments: str) -> str:
    try:
        load_nvrtc()
    except BackendError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "pytest", "--ptx", str(arch), "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_some_kernels() -> None:
    assert f"{len(SOME)} passed" in _pytest(90, "-n0", *SOME)


@pytest.mark.large
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", [90, 80, 75])
def test_all_kernels(arch: int) -> None:
    # races are looked for, and accesses counted, with the copies that sm_80 has brought
    others = ("compile", "races") if arch < 80 else ("compile",)
    files = sorted(path.name for path in HERE.glob("test_gpu_*.py") if not any(name in path.name for name in others))
    assert " passed" in _pytest(arch, "-n", str(os.cpu_count()), "--timeout", "3600", *files, "test_mma_fragments.py")
