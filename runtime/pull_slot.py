"""The place where one model is put together before it lands in `models/`: locked against other processes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyinfer.errors import DownloadError
from pyinfer.paths import models_dir
from pyinfer.runtime.file_lock import file_lock
from pyinfer.runtime.model_store import PARTIAL, Origin, write_origin
from pyinfer.runtime.progress import Progress
from pyinfer.runtime.sizes import format_size

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class PullSlot:
    """What a pull may write to until it is done."""

    name: str
    partial: Path  # verified parts, kept between pulls
    work: Path  # a fresh folder for everything else, removed with the slot

    def land(self, files: dict[Path, Path], origin: Origin) -> None:
        """Moves finished files to their names in `models/`, the first one last: only then does the model exist."""
        for source in files:
            with source.open("rb") as file:
                os.fsync(file.fileno())
        write_origin(self.name, origin)
        for source, target in reversed(files.items()):
            os.replace(source, target)
        _sync_folder(models_dir())


@contextlib.contextmanager
def pull_slot(name: str, progress: Progress) -> Iterator[PullSlot]:
    """The slot of `name`; waits while another process holds it. A failing disk becomes a DownloadError."""
    root = models_dir() / PARTIAL
    with _disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        waiting = f"another pyinfer is pulling {name}: waiting for it"
        with file_lock(root / f"{name}.lock", lambda: progress.say(waiting)):
            for stale in root.glob(f"{name}.work-*"):  # of a pull that was killed
                shutil.rmtree(stale, ignore_errors=True)
            slot = PullSlot(name, root / f"{name}.part", Path(tempfile.mkdtemp(prefix=f"{name}.work-", dir=root)))
            try:
                yield slot
            finally:
                shutil.rmtree(slot.work, ignore_errors=True)
                with contextlib.suppress(OSError):
                    if slot.partial.stat().st_size == 0:
                        slot.partial.unlink()


def check_space(n_bytes: int, what: str) -> None:
    """Refuses before the download what could not be stored after it."""
    free = shutil.disk_usage(models_dir()).free
    if free < n_bytes:
        raise DownloadError(
            f"{what} needs {format_size(n_bytes)} in {models_dir()} and {format_size(free)} are free; "
            "make room or set PYINFER_HOME to a larger disk"
        )


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or str(exc)
        if exc.errno in _FULL:
            raise DownloadError(f"{root}: {reason}; make room or set PYINFER_HOME to a larger disk") from exc
        raise DownloadError(
            f"cannot write to {exc.filename or root}: {reason}; set PYINFER_HOME to a folder that you can write to"
        ) from exc


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where a folder can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
