"""Runs the command line and turns every outcome into an exit code.

0 done, 1 failed (one line on stderr; the traceback only with --debug), 2 wrong usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from typing import Any

import typer

from pyinfer.cli.app import build_app
from pyinfer.cli.common import CliState
from pyinfer.cli.text import one_line
from pyinfer.errors import ConfigError, PyinferError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def run(args: list[str] | None = None) -> int:
    """The exit code of one command line (default: the process's own)."""
    state = CliState(debug=os.environ.get("PYINFER_DEBUG", "").lower() in ("1", "true", "yes", "on"))
    try:
        code = build_app().main(args, prog_name="pyinfer", standalone_mode=False, obj=state)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except Exception as exc:
        return _report(exc, state)
    return code if isinstance(code, int) else 0


def prepare_process() -> None:
    """What holds for the whole process, so not part of `run`: how streams encode, and what SIGTERM does."""
    for stream in (sys.stdout, sys.stderr):
        # A model may print what the terminal's encoding lacks; that must not end the program.
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    # Turned into an exception, so that a pull cleans up after itself; serve puts its own handler in place.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))


def _report(exc: Exception, state: CliState) -> int:
    if _is_usage_error(exc):
        config_error = _from_environment_or_file(exc, state)
        if config_error is None:
            exc.show()  # type: ignore[attr-defined]
            return EXIT_USAGE
        exc = config_error
    if state.debug:
        traceback.print_exception(exc)
        return EXIT_FAILED
    print(f"pyinfer: error: {_describe(exc)}", file=sys.stderr)
    return EXIT_FAILED


def _is_usage_error(exc: Exception) -> bool:
    return hasattr(exc, "exit_code") and hasattr(exc, "show")


def _from_environment_or_file(exc: Any, state: CliState) -> ConfigError | None:
    """A bad value that nobody typed on this command line names where it came from."""
    param, ctx = getattr(exc, "param", None), getattr(exc, "ctx", None)
    if param is None or ctx is None or not isinstance(exc, typer.BadParameter):
        return None
    source = getattr(ctx.get_parameter_source(param.name), "name", "")
    if source == "ENVIRONMENT":
        value = os.environ.get(param.envvar, "")
        return ConfigError(f"environment variable {param.envvar}={value!r}: {exc.message}")
    if source == "DEFAULT_MAP":
        option = next((o[2:] for o in param.opts if o.startswith("--")), param.name)
        return ConfigError(f"{state.config}: {option} = {(ctx.default_map or {}).get(param.name)!r}: {exc.message}")
    return None


def _describe(exc: Exception) -> str:
    if isinstance(exc, PyinferError):
        return one_line(str(exc))
    if isinstance(exc, MemoryError):
        return "out of memory; choose a smaller model, context (-c) or --kv-cache-memory"
    if isinstance(exc, ModuleNotFoundError):
        return one_line(f"{exc}; pyinfer is not installed whole: run 'pip install' for it again")
    if isinstance(exc, OSError):
        where = f"{exc.filename}: " if exc.filename else ""
        return one_line(f"{where}{exc.strerror or exc}")
    return one_line(
        f"internal error: {type(exc).__name__}: {exc}; run again with --debug for the traceback and report it"
    )
