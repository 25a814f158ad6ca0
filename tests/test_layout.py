"""The folders' order: who may import whom, and that packaging knows every folder. Reads the sources, runs nothing."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("quant", "graph", "kernels_cpu", "kernels_gpu", "runtime", "server", "convert", "loadgen")
# layer -> the layers it may import, beside itself and the standard library
ALLOWED: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "paths": frozenset(),
    "quant": frozenset({"errors", "paths"}),
    "graph": frozenset({"errors", "paths", "quant"}),
    "kernels_cpu": frozenset({"errors", "paths", "quant", "graph"}),
    "kernels_gpu": frozenset({"errors", "paths", "quant", "graph"}),
    "runtime": frozenset({"errors", "paths", "quant", "graph"}),
    "server": frozenset({"", "errors", "paths", "quant", "graph", "runtime"}),
    "convert": frozenset({"errors", "paths", "quant", "kernels_cpu"}),
    "loadgen": frozenset({"errors", "paths", "runtime"}),
    "cli": frozenset({"", "errors", "paths", *FOLDERS}),
    "": frozenset({"errors", "runtime", "cli"}),  # pyinfer/__init__.py and __main__.py
}
# the one door from the runtime to the kernels
DOOR, KERNELS = "runtime/backends.py", frozenset({"kernels_cpu", "kernels_gpu"})
# what only some layers may use, so that the others stay light and replaceable
CONFINED: dict[str, frozenset[str]] = {
    "cupy": frozenset({"kernels_gpu"}),
    "numba": frozenset({"kernels_cpu", "convert"}),
    "llvmlite": frozenset({"kernels_cpu", "convert"}),
    "fastapi": frozenset({"server"}),
    "starlette": frozenset({"server"}),
    "uvicorn": frozenset({"server"}),
    "typer": frozenset({"cli"}),
    "prompt_toolkit": frozenset({"cli"}),
}


@dataclass(frozen=True)
class Import:
    """One imported module, as written."""

    path: str  # of the file that imports, from the root
    line: int
    layer: str  # of that file
    module: str  # dotted
    is_relative: bool = False

    @property
    def target(self) -> str:
        """The layer that is imported: '' for pyinfer itself."""
        parts = self.module.split(".")
        return parts[1] if len(parts) > 1 else ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def source_files() -> Iterator[tuple[str, Path]]:
    """(layer, file) of everything that is installed."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield folder, path
    for path in sorted((ROOT / "pyinfer" / "cli").rglob("*.py")):
        yield "cli", path
    for path in sorted((ROOT / "pyinfer").glob("*.py")):
        yield (path.stem if path.stem in ("errors", "paths") else ""), path


def imports() -> list[Import]:
    """Every import statement, also those inside of functions and under TYPE_CHECKING."""
    found = []
    for layer, path in source_files():
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
            if isinstance(node, ast.Import):
                found += [Import(where, node.lineno, layer, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                if module == "pyinfer":  # `from pyinfer import quant` means pyinfer.quant
                    found += [Import(where, node.lineno, layer, _submodule(alias.name)) for alias in node.names]
                else:
                    found.append(Import(where, node.lineno, layer, module, node.level > 0))
    return found


def _submodule(name: str) -> str:
    return f"pyinfer.{name}" if name in ALLOWED else "pyinfer"


IMPORTS = imports()


def settings() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def test_every_folder_was_read() -> None:
    layers = {layer for layer, _ in source_files()}
    assert layers == set(ALLOWED)
    assert len(IMPORTS) > 300


def test_folders_import_only_what_is_below_them() -> None:
    wrong = [
        str(i)
        for i in IMPORTS
        if i.module.split(".")[0] == "pyinfer"
        and i.target not in ALLOWED[i.layer] | {i.layer}
        and not (i.path == DOOR and i.target in KERNELS)
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_are_absolute_and_go_through_pyinfer() -> None:
    """`import quant` would work in a checkout and fail, or be loaded twice, once installed."""
    wrong = [str(i) for i in IMPORTS if i.is_relative or i.module.split(".")[0] in FOLDERS]
    assert not wrong, "\n".join(wrong)


def test_confined_packages() -> None:
    wrong = [str(i) for i in IMPORTS if i.layer not in CONFINED.get(i.module.split(".")[0], frozenset({i.layer}))]
    assert not wrong, "\n".join(wrong)


def test_every_imported_package_is_a_dependency() -> None:
    project = settings()["project"]
    assert isinstance(project, dict)
    extras = project["optional-dependencies"]
    declared = {_import_name(text) for text in (*project["dependencies"], *extras["gpu"], *extras["plots"])}
    imported = {i.module.split(".")[0] for i in IMPORTS if not i.is_relative} - {"pyinfer", ""}
    missing = imported - set(sys.stdlib_module_names) - declared
    assert not missing, f"imported and not in pyproject.toml: {sorted(missing)}"


def test_tests_do_not_bring_cupy() -> None:
    project = settings()["project"]
    assert isinstance(project, dict)
    brought = (*project["dependencies"], *project["optional-dependencies"]["test"])
    assert not [text for text in brought if "cupy" in text]


def _import_name(requirement: str) -> str:
    name = requirement.split(">")[0].split("=")[0].split("[")[0].strip()
    if name.startswith("cupy-"):
        return "cupy"
    return {"pyzmq": "zmq"}.get(name, name.replace("-", "_"))


def test_every_package_is_installed() -> None:
    """setuptools takes the packages that are listed and no others: a forgotten folder is missing from the wheel."""
    tool = settings()["tool"]
    assert isinstance(tool, dict)
    listed = tool["setuptools"]["package-dir"]
    assert sorted(tool["setuptools"]["packages"]) == sorted(listed)
    folders = {path.parent.relative_to(ROOT).as_posix() for _, path in source_files()}
    assert {_package_of(folder): folder for folder in folders} == listed
    for folder in folders:
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} has no __init__.py"


def _package_of(folder: str) -> str:
    dotted = folder.replace("/", ".")
    return dotted if dotted.split(".")[0] == "pyinfer" else f"pyinfer.{dotted}"


def test_every_data_file_is_installed() -> None:
    tool = settings()["tool"]
    assert isinstance(tool, dict)
    patterns: dict[str, list[str]] = tool["setuptools"]["package-data"]
    missing = []
    for package, folder in tool["setuptools"]["package-dir"].items():
        for path in (*(ROOT / folder).glob("*"), *(ROOT / folder / "cuda").glob("*")):
            name = path.relative_to(ROOT / folder).as_posix()
            is_data = path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")
            if is_data and not any(fnmatch(name, pattern) for pattern in patterns.get(package, [])):
                missing.append(f"{folder}/{name}")
    assert not missing, f"not in package-data: {missing}"


def test_checkout_links() -> None:
    """In a checkout `pyinfer.quant` is a link to `quant`, for type checkers and for running without an installation."""
    for folder in FOLDERS:
        link = ROOT / "pyinfer" / folder
        assert link.is_symlink() and link.resolve() == ROOT / folder, f"pyinfer/{folder} is no link to ../{folder}"
