"""Hand-written PTX on the emulator: a kernel of 32 lanes around a few instructions, for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ptx_emulator.device import PTXDevice

from pyinfer.kernels_gpu.launch import Kernel, Launch

# %rd1: what is read, 64 bytes a lane; %rd2: what is written, 64 bytes a lane; %r1: the lane
HEAD = ".version 8.8\n.target sm_{arch}\n.address_size 64\n"
KERNEL = """
.visible .entry test(.param .u64 in, .param .u64 out)
{
  .reg .pred %p<9>;
  .reg .b16 %rs<9>;
  .reg .b32 %r<40>;
  .reg .f32 %f<20>;
  .reg .b64 %rd<20>;
  .reg .f64 %fd<9>;
  .shared .align 16 .b8 tile[2048];
  ld.param.u64 %rd1, [in];
  ld.param.u64 %rd2, [out];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 64;
  add.s64 %rd1, %rd1, %rd3;
  add.s64 %rd2, %rd2, %rd3;
BODY
  ret;
}
"""
Run = Callable[..., npt.NDArray[Any]]


def snippet(body: str, arch: int = 90) -> str:
    """The text of a kernel `test`."""
    return HEAD.format(arch=arch) + KERNEL.replace("BODY", body)


def load(n: int) -> str:
    """The lane's first words to %r10 and on."""
    return "".join(f"  ld.global.u32 %r{10 + i}, [%rd1+{4 * i}];\n" for i in range(n))


def store(n: int) -> str:
    """%r30 and on to the lane's first words."""
    return "".join(f"  st.global.u32 [%rd2+{4 * i}], %r{30 + i};\n" for i in range(n))


@contextmanager
def running(folder: Path) -> Iterator[Run]:
    """`run(body, words, arch)`: 32 lanes with 16 words of 32 bits each; what each has written to its own 16."""
    devices: list[PTXDevice] = []

    def run(body: str, words: npt.NDArray[Any] | None = None, arch: int = 90) -> npt.NDArray[Any]:
        path = folder / f"test{len(devices)}.ptx"
        path.write_text(snippet(body, arch))
        device = PTXDevice(arch=arch)
        devices.append(device)
        given = np.zeros((32, 16), np.uint32)
        if words is not None:
            bits = np.ascontiguousarray(words).view(np.uint32)
            given[:, : bits.shape[1]] = bits
        source, target = device.array(given), device.array(np.zeros((32, 16), np.uint32))
        device.launch(Launch(Kernel(str(path), "test"), (1, 1, 1), (32, 1, 1), (source, target)))
        return device.values(target, np.uint32, 32, 16)

    yield run
    for device in devices:
        device.close()
