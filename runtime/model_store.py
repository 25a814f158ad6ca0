"""The models that were pulled: `PYINFER_HOME/models/NAME.gguf` (or its shards), each beside a NAME.json.

The JSON tells where the model came from. A .gguf that the user put there by hand is listed as well. Nothing outside
this folder is ever removed.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from pyinfer.errors import ModelNotFoundError, PyinferError
from pyinfer.paths import models_dir

PARTIAL = ".partial"  # folder of unfinished pulls; on the same file system, so that a finished one lands by a rename
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class Origin:
    """Where a pulled model came from; the content of NAME.json."""

    source: str  # the reference that pulls it again, such as 'smollm2' or 'pypi:pkg==1.0'
    sha256: str  # of the file, or of its shards one after the other
    licence: str


@dataclass(frozen=True)
class StoredModel:
    """One model in the folder."""

    name: str
    path: Path  # the file, or the first shard
    files: tuple[Path, ...]
    n_bytes: int
    modified: float  # seconds since the epoch
    origin: Origin | None


def list_models() -> list[StoredModel]:
    """All models of the folder, by name; empty when there is no folder yet."""
    groups: dict[str, list[Path]] = {}
    try:
        found = sorted(models_dir().glob("*.gguf"))
    except OSError:
        return []
    for path in found:
        groups.setdefault(name_of(path), []).append(path)
    stored = (_stored(name, files) for name, files in sorted(groups.items()))
    return [model for model in stored if model is not None]


def find(name: str) -> StoredModel | None:
    """The model of this name, if it was pulled."""
    return next((model for model in list_models() if model.name == name), None)


def remove(name: str) -> StoredModel:
    """Deletes a model and its NAME.json, and returns what it was. Only names of `list_models` are known here."""
    model = find(name)
    if model is None:
        stored = ", ".join(m.name for m in list_models()) or "none"
        raise ModelNotFoundError(f"no pulled model is named {name!r}; pulled: {stored}", param="model")
    try:
        for path in (*model.files, origin_path(name)):
            path.unlink(missing_ok=True)
    except OSError as exc:
        raise PyinferError(f"cannot remove {exc.filename}: {exc.strerror}") from exc
    return model


def name_of(path: Path) -> str:
    """'m' of both 'm.gguf' and 'm-00001-of-00003.gguf'."""
    shard = _SHARD.fullmatch(path.stem)
    return shard[1] if shard else path.stem


def origin_path(name: str) -> Path:
    """The file beside the model that tells its origin."""
    return models_dir() / f"{name}.json"


def write_origin(name: str, origin: Origin) -> None:
    """Writes NAME.json whole or not at all."""
    path = origin_path(name)
    draft = models_dir() / PARTIAL / f"{name}.json"
    draft.write_text(json.dumps(asdict(origin), indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _stored(name: str, files: list[Path]) -> StoredModel | None:
    shard = _SHARD.fullmatch(files[0].stem)
    if shard is not None and (int(shard[2]) != 1 or int(shard[3]) != len(files)):
        return None
    try:
        stats = [path.stat() for path in files]
    except OSError:
        return None  # removed by another process meanwhile, or a dangling link
    n_bytes, modified = sum(s.st_size for s in stats), max(s.st_mtime for s in stats)
    return StoredModel(name, files[0], tuple(files), n_bytes, modified, _read_origin(name))


def _read_origin(name: str) -> Origin | None:
    try:
        fields = json.loads(origin_path(name).read_text(encoding="utf-8"))
        return Origin(*(str(fields[key]) for key in ("source", "sha256", "licence")))
    except (OSError, ValueError, TypeError, KeyError):
        return None
