"""Builds the peer that pyinfer is measured against: llama.cpp's own programs, natively compiled.

    python benchmarks/build_peer.py

The source is the copy inside llama-cpp-python's sdist, fetched through your own pip and checked by sha256, so that
every machine measures the same code. Needs cmake, a C++ compiler, 2 GB of disk and about four minutes on two cores.
Everything lies under PYINFER_HOME/peer; what is already done is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from pyinfer.paths import home

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TARGETS = ("llama-bench", "llama-batched-bench", "llama-completion", "llama-server", "llama-quantize")
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip
_SOURCE_IN_SDIST = "vendor/llama.cpp"
_SHARE_DONE = re.compile(r"^\[\s*(\d+)(?:%|/(\d+))\]")  # make's "[ 12%]", ninja's "[3/120]"


class BuildError(Exception):
    """What went wrong and what to do about it, in a few lines."""


def peer_folder() -> Path:
    return home() / "peer" / f"{PACKAGE}-{VERSION}"


def binary_folder() -> Path:
    """Where the programs are once they are built."""
    return peer_folder() / "build" / "bin"


def download(folder: Path) -> Path:
    """The sdist, checked; fetched unless it is there."""
    sdist = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"
    if not sdist.is_file() or sha256_of(sdist) != SHA256:
        sdist.unlink(missing_ok=True)
        print(f"downloading {PACKAGE} {VERSION} (77 MB)", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", PACKAGE, "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not sdist.is_file():
            raise BuildError(f"pip could not download {PACKAGE}=={VERSION}:\n{_tail(done.stderr or done.stdout)}")
    actual = sha256_of(sdist)
    if actual != SHA256:
        sdist.unlink()
        raise BuildError(f"{sdist.name} has sha256 {actual}, expected {SHA256}; it was removed, run this again")
    return sdist


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extract(sdist: Path, folder: Path) -> Path:
    """llama.cpp's source tree; lands whole or not at all."""
    source = folder / "source"
    if source.is_dir():
        return source
    print("extracting", flush=True)
    prefix = f"{sdist.name.removesuffix('.tar.gz')}/{_SOURCE_IN_SDIST}/"
    partial = folder / "source.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if member.name.startswith(prefix)]
        if not members:
            raise BuildError(f"{sdist.name} holds no {_SOURCE_IN_SDIST}")
        for member in members:
            member.name = member.name.removeprefix(prefix)
        archive.extractall(partial, members, filter="data")
    partial.rename(source)
    return source


def check_tools() -> None:
    """BuildError that names each missing tool."""
    missing = []
    if shutil.which("cmake") is None:
        missing.append("cmake is missing: install your system's package, or `pip install cmake`")
    compilers = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    if not any(name and shutil.which(name.split()[0]) for name in compilers):
        missing.append("no C++ compiler was found: install g++ or clang, or name one in CXX")
    if shutil.which("make") is None and shutil.which("ninja") is None:
        missing.append("neither make nor ninja was found: install one, or `pip install ninja`")
    if missing:
        raise BuildError("\n".join(missing))


def configure(source: Path, build: Path) -> None:
    print("configuring", flush=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (build / "CMakeCache.txt").exists() else []
    command = ["cmake", "-S", str(source), "-B", str(build), *generator, *_OPTIONS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"cmake could not configure {source}:\n{_tail(done.stdout)}")


def compile_targets(build: Path, targets: list[str], jobs: int) -> None:
    """Runs the compiler with one progress line; the whole output is in build.log."""
    command = ["cmake", "--build", str(build), "--parallel", str(jobs), "--target", *targets]
    log = build.parent / "build.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        shown = -1
        for line in process.stdout:
            file.write(line)
            match = _SHARE_DONE.match(line)
            if match:
                share = int(match[1]) if match[2] is None else 100 * int(match[1]) // int(match[2])
                shown = _show(share, shown)
        code = process.wait()
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if code != 0:
        raise BuildError(f"the build failed; the end of {log}:\n{_tail(log.read_text())}")


def _show(share: int, shown: int) -> int:
    """A line that is rewritten on a terminal; elsewhere one every 10 percent. Returns what is shown now."""
    if sys.stderr.isatty():
        print(f"\rcompiling {share:3d} %", end="", file=sys.stderr, flush=True)
        return share
    if share // 10 > shown // 10 or shown < 0:
        print(f"compiling {share} %", file=sys.stderr, flush=True)
        return share
    return shown


def _tail(text: str, n_lines: int = 20) -> str:
    return "\n".join(text.strip().splitlines()[-n_lines:])


def build(targets: list[str], jobs: int, *, configure_only: bool = False) -> Path:
    """The folder of the programs, built as far as they are not there."""
    folder, binaries = peer_folder(), binary_folder()
    if not configure_only and all((binaries / name).is_file() for name in targets):
        return binaries
    check_tools()
    source = extract(download(folder), folder)
    configure(source, folder / "build")
    if not configure_only:
        compile_targets(folder / "build", targets, jobs)
    return binaries


def main() -> int:
    parser = argparse.ArgumentParser(description="Build llama.cpp's programs under PYINFER_HOME/peer.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once (default: all CPUs)")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument("--configure-only", action="store_true", help="stop before compiling")
    arguments = parser.parse_args()
    targets = arguments.target or list(TARGETS)
    try:
        folder = build(targets, arguments.jobs, configure_only=arguments.configure_only)
    except (BuildError, OSError, tarfile.TarError) as error:
        print(f"build_peer: {error}", file=sys.stderr)
        return 1
    if not arguments.configure_only:
        print("\n".join(str(folder / name) for name in targets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
