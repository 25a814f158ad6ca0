"""Imports every module of the installed package, so that a file or dependency the wheel lacks cannot go unseen."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pyinfer

NEEDS_A_GPU = "pyinfer.kernels_gpu.cupy_device"  # CuPy is an extra
names = [
    module.name
    for module in pkgutil.walk_packages(pyinfer.__path__, "pyinfer.")
    if "__main__" not in module.name and module.name != NEEDS_A_GPU
]
for name in names:
    importlib.import_module(name)
for name in pyinfer.__all__:
    getattr(pyinfer, name)
folder = Path(pyinfer.__file__).parent
for data in ("py.typed", "server/page.html", "kernels_gpu/cuda/ptx.cuh"):
    assert (folder / data).is_file(), data
assert {name.split(".")[1] for name in names} >= {
    "cli",
    "quant",
    "graph",
    "kernels_cpu",
    "kernels_gpu",
    "runtime",
    "server",
    "convert",
    "loadgen",
}
print(f"{len(names)} modules of {folder} import")
