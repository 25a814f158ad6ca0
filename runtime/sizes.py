"""Byte counts as people write and read them."""

from __future__ import annotations

import re

from pyinfer.errors import ConfigError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """'4GiB', '4g', '512M', '1.5G' or '1048576' in bytes; units are powers of 1024, as in llama.cpp and docker."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ConfigError(f"{text!r} is not a size; write bytes or a number with K, M, G or T, like 512M or 4G")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(n_bytes: int) -> str:
    """'98.4 MB': decimal units with one digit, as pip and package registries print them."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    value = float(n_bytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def format_binary(n_bytes: int) -> str:
    """'93.8 MiB': binary units with one digit, for memory."""
    if n_bytes < 1024:
        return f"{n_bytes} B"
    value = float(n_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"
