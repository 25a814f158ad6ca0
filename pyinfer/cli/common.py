"""What every command has: `--config FILE`, `--debug` and `--log-level`, added to its signature in one place."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pyinfer.cli.config_file import read_config
from pyinfer.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")
_PANEL = "Common"


@dataclass
class CliState:
    """What one run of the command line found out before the command itself starts; travels as the context's object."""

    debug: bool = False  # show tracebacks
    config: Path | None = None  # the TOML file that default values came from


def _state(ctx: Any) -> CliState:
    return ctx.find_root().ensure_object(CliState)  # type: ignore[no-any-return]


def _load_config(ctx: typer.Context, value: Path | None) -> Path | None:
    if value is not None and not ctx.resilient_parsing:
        _state(ctx).config = value
        ctx.default_map = read_config(value, ctx.info_name or "", ctx.command.params)
    return value


def _set_debug(ctx: typer.Context, value: bool) -> bool:
    _state(ctx).debug |= value
    return value


def checked(parse: Callable[[str], object]) -> Callable[[str | None], str | None]:
    """An option's callback: what `parse` refuses with a ConfigError is wrong usage, wherever the value came from."""

    def check(value: str | None) -> str | None:
        if value is not None:
            try:
                parse(value)
            except ConfigError as exc:
                raise typer.BadParameter(str(exc)) from exc
        return value

    return check


def set_log_level(value: str) -> str:
    """Sends the log of pyinfer to stderr from this level on."""
    if value not in LOG_LEVELS:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(LOG_LEVELS)}")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("pyinfer").setLevel(value.upper())
    return value


def _common(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            is_eager=True,
            callback=_load_config,
            help="TOML file of options.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    debug: Annotated[
        bool,
        typer.Option("--debug", is_eager=True, callback=_set_debug, help="Show tracebacks.", rich_help_panel=_PANEL),
    ] = False,
    log_level: Annotated[
        str,
        typer.Option(
            "--log-level",
            metavar="|".join(LOG_LEVELS),
            callback=set_log_level,
            help="Log to stderr.",
            rich_help_panel=_PANEL,
        ),
    ] = "warning",
) -> None:
    """Only its parameters count."""


def with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the common options to a command; one that it declares itself stays its own and gets the value."""
    own = inspect.signature(command, eval_str=True)
    added = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(_common, eval_str=True).parameters.values()
        if p.name not in own.parameters
    ]

    @functools.wraps(command)
    def call(*args: Any, **kwargs: Any) -> None:
        for p in added:
            kwargs.pop(p.name, None)
        command(*args, **kwargs)

    return with_signature(call, own.replace(parameters=[*own.parameters.values(), *added]))


def with_signature(call: Callable[..., None], signature: inspect.Signature) -> Callable[..., None]:
    """Makes typer see `signature` on `call`: it reads both the signature and the annotations."""
    call.__dict__.pop("__wrapped__", None)
    call.__dict__["__signature__"] = signature
    call.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()} | {"return": None}
    return call
