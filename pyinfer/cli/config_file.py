"""The TOML file of `--config`: keys are the long names of options (`ctx-size` or `ctx_size`).

Keys at the top hold for every command that has the option; a table named after a command (`[serve]`) holds for that
command alone and wins. A key that no command knows is an error, so that a spelling mistake never passes in silence.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyinfer.errors import ConfigError

_NEVER = {"config", "help", "version"}


def read_config(path: Path, command: str, params: Sequence[Any]) -> dict[str, Any]:
    """Default values for `command`, by parameter name, as strings that the option's own type will check."""
    document = _parse(path)
    own = option_keys(params)
    values: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            continue
        known = own.get(_normal(key))
        if known is not None:
            values[known.name] = _as_text(path, key, value, known)
        elif _normal(key) not in _keys_of_all_commands():
            raise _unknown(path, key, _keys_of_all_commands(), "")
    for name, table in document.items():
        if not isinstance(table, dict):
            continue
        if name not in _command_names():
            raise ConfigError(f"{path}: [{name}] is not a command; commands are {', '.join(_command_names())}")
        if name != command:
            continue
        for key, value in table.items():
            known = own.get(_normal(key))
            if known is None:
                raise _unknown(path, key, own, f" in [{name}]")
            values[known.name] = _as_text(path, key, value, known)
    return values


def option_keys(params: Sequence[Any]) -> dict[str, Any]:
    """The keys that a command understands, each with its option."""
    keys: dict[str, Any] = {}
    for param in params:
        if param.param_type_name != "option":
            continue
        for opt in param.opts:
            if opt.startswith("--") and _normal(opt[2:]) not in _NEVER:
                keys[_normal(opt[2:])] = param
    return keys


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"--config {path}: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"--config {path} is not valid TOML: {exc}") from exc


def _as_text(path: Path, key: str, value: Any, param: Any) -> Any:
    if isinstance(value, list):
        if any(isinstance(item, (list, dict)) for item in value):
            raise ConfigError(f"{path}: {key}: a list of plain values is needed here")
        items = [str(item) for item in value]
        return items if param.multiple else ",".join(items)
    if isinstance(value, bool) and not param.is_flag:
        raise ConfigError(f"{path}: {key}: true and false are no values for this option")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return [text] if param.multiple else text


def _unknown(path: Path, key: str, known: Sequence[str] | dict[str, Any] | frozenset[str], where: str) -> ConfigError:
    near = difflib.get_close_matches(_normal(key), sorted(known), n=1)
    hint = f"; did you mean {near[0].replace('_', '-')}?" if near else "; 'pyinfer COMMAND --help' lists the options"
    return ConfigError(f"{path}: unknown key {key!r}{where}{hint}", param=key)


def _normal(key: str) -> str:
    return key.replace("-", "_")


def _command_names() -> list[str]:
    from pyinfer.cli.app import COMMANDS

    return list(COMMANDS)


def _keys_of_all_commands() -> frozenset[str]:
    from pyinfer.cli.app import load_command

    return frozenset(key for name in _command_names() for key in option_keys(load_command(name).params))
