"""What a user is told when a file cannot be written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyinfer.errors import ConvertError


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A full disk, a missing folder and the like while `path` is written as a whole file are ConvertErrors."""
    try:
        yield
    except OSError as error:
        raise ConvertError(f"{path}: cannot be written: {error.strerror or error}; nothing is left") from error
