"""x"""

from __future__ import annotations
from typing import Annotated
import typer
from pyinfer.cli.options import EngineOptions, with_engine_options


@with_engine_options
def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="x")],
    json_: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    *,
    engine: EngineOptions,
) -> None:
    """Show the model.

    More."""
    print(model, json_, engine)
