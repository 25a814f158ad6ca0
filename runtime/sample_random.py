"""Counter-based randomness: a pure function of (seed, sample index, position), so nothing that runs beside matters."""

from __future__ import annotations

import struct
from hashlib import blake2b

_pack = struct.Struct("<qqq").pack
_UNIT = 2.0**-53


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: BLAKE2b (RFC 7693) of the counter. About a microsecond.

    `position` is the absolute position in the sequence of the token to be drawn. Seeds are taken modulo 2^64.
    """
    digest = blake2b(_pack(signed(seed), index, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * _UNIT


def signed(seed: int) -> int:
    """Modulo 2^64, as a signed integer."""
    return (seed + 2**63) % 2**64 - 2**63
