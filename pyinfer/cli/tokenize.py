"""`pyinfer tokenize`: a text as the model sees it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pyinfer.cli.console import print_table
from pyinfer.errors import ConfigError


def tokenize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A path, a name, pypi:PACKAGE or npm:PACKAGE.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text; '-' reads it from stdin.")],
    ids: Annotated[bool, typer.Option("--ids", help="Only the ids, on one line.")] = False,
    no_bos: Annotated[
        bool, typer.Option("--no-bos", help="Leave out the tokens that a model puts around a text.")
    ] = False,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read the names of control tokens in TEXT as those tokens.")
    ] = False,
) -> None:
    """Show the tokens of a text."""
    from pyinfer.cli.progress import terminal_progress
    from pyinfer.runtime.hub import resolve
    from pyinfer.runtime.tokenizer import load_tokenizer

    if text == "-":
        text = _read_stdin()
    tokenizer = load_tokenizer(resolve(model, terminal_progress()))
    tokens = tokenizer.encode(text, add_special=not no_bos, parse_special=parse_special)
    if ids:
        print(" ".join(map(str, tokens)))
        return
    rows = [(str(token), _visible(tokenizer.token_bytes(token), tokenizer.token_text(token))) for token in tokens]
    print_table(("id", "token"), rows, right=("id",))


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"stdin is not UTF-8 text: {exc}", param="text") from exc


def _visible(content: bytes, name: str) -> str:
    """The token's bytes in quotes, part characters as \\x..; a control token, which has none, by its name."""
    return f"'{content.decode('utf-8', 'backslashreplace')}'" if content else name
