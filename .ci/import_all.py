"""Imports every module of the installed package, so that a file or dependency the wheel lacks cannot go unseen."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pyinfer

names = [module.name for module in pkgutil.walk_packages(pyinfer.__path__, "pyinfer.") if "__main__" not in module.name]
for name in names:
    importlib.import_module(name)
for name in pyinfer.__all__:
    getattr(pyinfer, name)
folder = Path(pyinfer.__file__).parent
for data in ("py.typed", "server/page.html"):
    assert (folder / data).is_file(), data
assert {name.split(".")[1] for name in names} >= {
    "cli",
    "quant",
    "graph",
    "kernels_cpu",
    "runtime",
    "server",
    "convert",
    "loadgen",
}
print(f"{len(names)} modules of {folder} import")
