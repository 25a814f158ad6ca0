"""`pyinfer list`: the models that are here, and those that can be fetched by name."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer

from pyinfer.cli.console import print_table


def list_models(
    show_all: Annotated[bool, typer.Option("--all", "-a", help="Also the catalogue's models not pulled yet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List pulled models."""
    from pyinfer.runtime.catalogue import CATALOGUE
    from pyinfer.runtime.hub import list_models as stored_models
    from pyinfer.runtime.sizes import format_size

    stored = stored_models()
    here = {model.name for model in stored}
    missing = [model for name, model in CATALOGUE.items() if name not in here]
    if as_json:
        objects = [
            {
                "name": m.name,
                "size": m.n_bytes,
                "modified": m.modified,
                "source": m.origin.source if m.origin else None,
                "sha256": m.origin.sha256 if m.origin else None,
                "licence": m.origin.licence if m.origin else None,
                "path": str(m.path),
            }
            for m in stored
        ]
        if show_all:
            objects += [
                {"name": m.name, "size": m.n_bytes, "source": m.name, "licence": m.licence, "path": None}
                for m in missing
            ]
        print(json.dumps(objects, indent=2))
        return
    rows = [
        (m.name, format_size(m.n_bytes), _when(m.modified), m.origin.source if m.origin else "local file", str(m.path))
        for m in stored
    ]
    if show_all:
        rows += [(m.name, format_size(m.n_bytes), "-", "catalogue", "not pulled") for m in missing]
    if rows:
        print_table(("name", "size", "modified", "source", "path"), rows, right=("size",))
    if missing and not show_all and sys.stdout.isatty():
        names = ", ".join(f"{m.name} ({format_size(m.n_bytes)})" for m in missing)
        print(f"Can be pulled: {names}")


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
