"""`pyinfer rm`: delete pulled models."""

from __future__ import annotations

from typing import Annotated

import typer


def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names from 'pyinfer list'.")],
) -> None:
    """Delete pulled models; files elsewhere are left alone."""
    from pyinfer.runtime import hub
    from pyinfer.runtime.sizes import format_size

    for name in names:
        removed = hub.remove(name)
        print(f"removed {removed.name} ({format_size(removed.n_bytes)})")
