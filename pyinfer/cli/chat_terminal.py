"""The chat in the terminal: a line editor with history, slash commands, answers that Ctrl-C stops."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import msgspec

from pyinfer.cli.chat_session import ChatSession
from pyinfer.cli.console import print_facts
from pyinfer.cli.run import stopped_by_ctrl_c, write_answer
from pyinfer.cli.text import one_line
from pyinfer.errors import PyinferError

_HELP = '''\
/help                 this text
/clear                forget the conversation
/system [TEXT]        show or set the system message (it starts a new conversation); /system - removes it
/set [NAME [VALUE]]   show or set a sampling parameter, like: /set temperature 0.5
/show                 the model, the context and the parameters
/bye                  leave (or Ctrl-D)

Enter sends, Alt-Enter starts a new line; a text between """ and """ may have several lines.
Ctrl-C stops an answer. A message that starts with / is written with //.'''
_SETTABLE = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "repeat_last_n", "seed", "min_tokens", "max_tokens", "stop",
)  # fmt: skip


class ChatTerminal:
    """Reads, answers and obeys until the user leaves."""

    def __init__(self, session: ChatSession, *, verbose: bool = False) -> None:
        self._session = session
        self._verbose = verbose
        self._defaults = session.params
        self._dropped_shown = 0
        self._editor = _editor()

    def run(self) -> None:
        name = self._session.model.info.model_type
        print(f"{name}, context {self._session.model.n_ctx} tokens. /help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                text = self._read()
            except KeyboardInterrupt:  # at the prompt: drop the line, as shells do
                continue
            except EOFError:
                return
            if not text.strip():
                continue
            if text.startswith("/") and not text.startswith("//"):
                if not self._obey(text):
                    return
            else:
                self._answer(text[1:] if text.startswith("//") else text)

    def _read(self) -> str:
        text: str = self._editor.prompt(">>> ")
        if not text.lstrip().startswith('"""'):
            return text
        text = text.lstrip()[3:]
        while not text.rstrip().endswith('"""'):
            text += "\n" + self._editor.prompt("... ")
        return text.rstrip()[:-3].strip("\n")

    def _answer(self, text: str) -> None:
        session = self._session
        try:
            with stopped_by_ctrl_c(session):
                ends_line = write_answer(session.ask(text))
        except PyinferError as error:
            _say(f"error: {one_line(str(error))}")
            return
        except KeyboardInterrupt:
            ends_line = False
        print("" if ends_line else "\n")
        stats = session.stats
        if stats.dropped_turns > self._dropped_shown:
            self._dropped_shown = stats.dropped_turns
            _say("the context was full: the oldest turns are forgotten")
        if stats.finish_reason == "length" and session.params.max_tokens is None:
            _say("the answer filled the context; /clear starts anew, a larger -c holds more")
        if self._verbose:
            _say(str(stats))

    def _obey(self, line: str) -> bool:
        """Carry out a command; False to leave."""
        command, _, rest = line[1:].strip().partition(" ")
        rest = rest.strip()
        if command in ("bye", "exit", "quit"):
            return False
        if command in ("help", "?"):
            print(_HELP)
        elif command == "clear":
            self._clear()
            _say("the conversation is forgotten")
        elif command == "system":
            self._set_system(rest)
        elif command == "set":
            self._set(rest)
        elif command == "show":
            self._show()
        else:
            _say(f"there is no command /{one_line(command)}; /help lists them")
        return True

    def _clear(self) -> None:
        self._session.clear()
        self._dropped_shown = 0

    def _set_system(self, text: str) -> None:
        if not text:
            _say(f"system message: {self._session.system or 'none'}")
            return
        self._session.system = None if text == "-" else text
        self._clear()
        _say("the system message is removed" if text == "-" else "the system message is set")

    def _set(self, text: str) -> None:
        params = msgspec.structs.asdict(self._session.params)
        name, _, value = text.partition(" ")
        if not name:
            for each in _SETTABLE:
                print(f"  {each} {params[each]}")
            return
        if name not in _SETTABLE:
            _say(f"there is no parameter {one_line(name)}; there are: {', '.join(_SETTABLE)}")
            return
        if not value.strip():
            _say(f"{name} is {params[name]}")
            return
        try:
            self._session.params = self._session.params.replace(**{name: self._parsed(name, value.strip())})
        except PyinferError as error:
            _say(one_line(str(error)))
        else:
            _say(f"{name} is {getattr(self._session.params, name)}")

    def _parsed(self, name: str, value: str) -> Any:
        """`default` is the value at the start, `none` is none; stop strings may be quoted."""
        if value == "default":
            return getattr(self._defaults, name)
        if value == "none":
            return None
        if name == "stop":
            try:
                return shlex.split(value)
            except ValueError:
                return [value]
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
        return value

    def _show(self) -> None:
        session = self._session
        model = session.model
        params = msgspec.structs.asdict(session.params)
        print_facts(
            model.info.name or model.info.path.name,
            [
                ("file", model.info.path),
                ("type", model.info.model_type),
                (
                    "context",
                    f"{session.stats.prompt_tokens + session.stats.answer_tokens} of {model.n_ctx} tokens used",
                ),
                ("threads", model.config.n_threads),
                ("system", session.system),
                (
                    "parameters",
                    ", ".join(f"{name} {params[name]}" for name in _SETTABLE if params[name] not in (None, [])),
                ),
                ("last answer", str(session.stats) if session.stats.answer_tokens else None),
            ],
        )


def _say(text: str) -> None:
    """A remark of ours, set apart from the model's words."""
    dim, reset = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    print(f"{dim}[{text}]{reset}")


def _editor() -> Any:
    """A line editor whose history is kept under PYINFER_HOME."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    from pyinfer.paths import home

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    history: History
    try:
        folder = home()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "history"
        path.touch(mode=0o600)
        history = FileHistory(str(path))
    except OSError:
        history = InMemoryHistory()
    return PromptSession(history=history, key_bindings=keys, enable_history_search=True)
