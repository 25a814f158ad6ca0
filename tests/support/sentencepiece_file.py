"""Writes SentencePiece's `tokenizer.model`: the pieces and the kind of model, nothing else."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

_BPE = 2


def write_sentencepiece(path: Path, pieces: Iterable[tuple[str, float, int]], model_type: int = _BPE) -> Path:
    """`pieces` are (text, score, kind) in the order of the ids."""
    content = b"".join(_message(1, _piece(*piece)) for piece in pieces)
    trainer = _key(3, 0) + _varint(model_type) + _key(35, 0) + _varint(1)  # 35: falls back to bytes
    path.write_bytes(content + _message(2, trainer))
    return path


def _piece(text: str, score: float, kind: int) -> bytes:
    return _message(1, text.encode()) + _key(2, 5) + struct.pack("<f", score) + _key(3, 0) + _varint(kind)


def _message(number: int, content: bytes) -> bytes:
    return _key(number, 2) + _varint(len(content)) + content


def _key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
