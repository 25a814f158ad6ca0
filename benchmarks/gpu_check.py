"""Everything about a GPU in one call: are the kernels right, are whole models, how fast, and does it last.

    python benchmarks/gpu_check.py --out FOLDER [--models a.gguf b.gguf] [--only kernels,speed] [--sanitize]

Sections, each in a process of its own with a limit of time, so that a crash of one costs no other:

kernels   the tests of tests/backend/test_gpu_*.py on the card instead of the emulator, inputs of a new seed, every buffer
          poisoned before use and guarded at its end. With --sanitize also under compute-sanitizer's memcheck and racecheck.
models    logits of real shapes with random weights against the CPU's; --models: 32 greedy tokens on the GPU, on the CPU, and
          with half the layers on each; where they part, the gap between the two logits that were nearly equal
speed     Llama-3.1-8B and Llama-3.2-1B with random weights: prompts, decoding alone, at depth, and of many sequences
offload   half the layers on the GPU
soak      64 streams for a minute: no error, books balanced, memory as before

Results are written as they come: FOLDER/gpu_check.jsonl, one object a line, and FOLDER/gpu_check.txt, the tables; what
compute-sanitizer says is in FOLDER/memcheck.txt and FOLDER/racecheck.txt. --limits kernels=200,speed=300 gives other limits of
time, --match an expression for pytest's -k, for the kernels. Needs CuPy, the test extra, and 15 GB of disk for the models of the
speed section. A warm-up of half a second comes before any clock.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

from gpu_models import check_models, check_soak  # noqa: E402
from gpu_report import Report  # noqa: E402
from gpu_speed import check_offload, check_speed  # noqa: E402

from pyinfer.errors import BackendError  # noqa: E402
from pyinfer.kernels_gpu.nvrtc import load_nvrtc  # noqa: E402
from pyinfer.kernels_gpu.requirements import usable_gpus  # noqa: E402

LIMITS = {"kernels": 420, "memcheck": 560, "racecheck": 560, "models": 240, "speed": 420, "offload": 200, "soak": 120}
WITHOUT_GPU = re.compile("compile|races|limits")  # files of tests that are about the emulator, or the compiler
NEEDED = ("numba", "llvmlite", "msgspec", "tokenizers", "jinja2", "pytest", "pytest_timeout")


def check_kernels(report: Report, options: argparse.Namespace) -> None:
    """Each file of tests in a process of its own, all at once: most of the time is NVRTC's, on a core each."""
    if options.file:
        sys.exit(_run_tests(report, options))
    began = time.monotonic()
    command = [sys.executable, __file__, "--section", "kernels", "--out", options.out, "--seed", str(options.seed)]
    command += ["--label", options.label or "kernels", *(["--first"] if options.first else [])]
    command += ["--match", options.match]
    files = [
        path for path in sorted((ROOT / "tests" / "backend").glob("test_gpu_*.py")) if not WITHOUT_GPU.search(path.stem)
    ]
    running = {path.name: subprocess.Popen([*command, "--file", str(path)]) for path in files}
    codes = {name: process.wait() for name, process in running.items()}
    failed = [name for name, code in codes.items() if code]
    seconds = time.monotonic() - began
    report.add("kernels", options.label or "kernels", seed=options.seed, seconds=seconds, failed=failed)
    if failed:
        sys.exit(1)


def _run_tests(report: Report, options: argparse.Namespace) -> int:
    import pytest
    from gpu_device import install

    install(options.seed)
    counts: dict[str, int] = {}

    class Count:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.failed:
                counts[report.outcome] = counts.get(report.outcome, 0) + 1

    flags = ["-q", "-x" if options.first else "-ra", "--timeout=300", "-p", "no:cacheprovider", "-k", options.match]
    code = int(pytest.main([options.file, *flags], plugins=[Count()]))
    code = 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code
    report.add("kernels", f"{options.label}: {Path(options.file).name}", exit=code, **counts)
    return code


SECTIONS: dict[str, Callable[[Report, argparse.Namespace], None]] = {
    "kernels": check_kernels,
    "models": check_models,
    "speed": check_speed,
    "offload": check_offload,
    "soak": check_soak,
}


def main() -> int:
    """0 if every section ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu_check", help="folder for the results")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--models", nargs="*", default=[], help="GGUF files to compare GPU and CPU on")
    parser.add_argument("--sanitize", action="store_true", help="kernels under compute-sanitizer too")
    parser.add_argument("--scratch", default=os.environ.get("TMPDIR", "/var/tmp"), help="folder for synthetic models")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--soak-seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 20))
    parser.add_argument("--tiny", action="store_true", help="toy models: is the script itself right")
    parser.add_argument("--first", action="store_true", help="kernels: stop at the first failure")
    parser.add_argument("--match", default="", help="kernels: tests of these names, as pytest's -k")
    parser.add_argument("--limits", default="", help="seconds of sections: kernels=200,memcheck=150")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--label", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    report = Report(Path(options.out))
    if options.section:
        SECTIONS[options.section](report, options)
        return 0
    Path(options.scratch).mkdir(parents=True, exist_ok=True)
    try:
        for gpu in usable_gpus():
            report.add(
                "gpu_check", gpu.name, arch=gpu.arch, free_gib=gpu.free / 2**30, nvrtc=load_nvrtc().dotted_version
            )
    except BackendError as error:
        print(error, file=sys.stderr)
        return 1
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        report.add("gpu_check", "not installed, sections that need them will fail", packages=" ".join(missing))
    for pair in filter(None, options.limits.split(",")):
        LIMITS[pair.partition("=")[0]] = int(pair.partition("=")[2])
    failed = 0
    for section in options.only.split(","):
        failed += _in_process(report, section, section, [], options)
        for tool in ("memcheck", "racecheck") if section == "kernels" and options.sanitize else ():
            before = ["compute-sanitizer", "--target-processes", "all", "--tool", tool, "--error-exitcode", "9"]
            failed += _in_process(report, section, tool, before, options)
    return min(failed, 1)


def _in_process(report: Report, section: str, label: str, before: list[str], options: argparse.Namespace) -> int:
    values = {
        "--section": section,
        "--label": label,
        "--out": options.out,
        "--scratch": options.scratch,
        "--repetitions": str(options.repetitions),
        "--soak-seconds": str(options.soak_seconds),
        "--seed": str(options.seed),
        "--match": options.match,
    }
    flags = [flag for flag, is_set in (("--tiny", options.tiny), ("--first", options.first)) if is_set]
    pairs = [word for pair in values.items() for word in pair]
    command = [*before, sys.executable, __file__, *pairs, *flags, "--models", *options.models]
    log = (Path(options.out) / f"{label}.txt").open("w") if before else None
    began = time.monotonic()
    try:
        process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log and subprocess.STDOUT)
        code = process.wait(LIMITS[label])
        ended = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        # with the processes that it started, which would disturb the next section
        os.killpg(process.pid, signal.SIGKILL)
        ended = f"did not end within {LIMITS[label]} s"
    except FileNotFoundError as error:
        ended = str(error)
    report.add(section, label, ended=ended or "well", seconds=time.monotonic() - began)
    return int(bool(ended))


if __name__ == "__main__":
    sys.exit(main())
