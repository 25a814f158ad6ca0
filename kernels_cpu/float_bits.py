"""Floats among the integers of an op record."""

from __future__ import annotations

import struct


def float_bits(value: float) -> int:
    """A float32's bits, as the low half of an operand word."""
    return int.from_bytes(struct.pack("<f", value), "little")
