"""Reading SentencePiece's `tokenizer.model`: the few fields of its protobuf message that a GGUF needs.

Own reader of 60 lines instead of a package with a C++ library. Messages: `sentencepiece_model.proto` of
github.com/google/sentencepiece; encoding: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from pyinfer.errors import ConvertError

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType


class PieceKind(IntEnum):
    """SentencePiece's own numbers, which are also those of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: PieceKind


def read_sentencepiece(path: Path) -> list[Piece]:
    """The pieces in the order of their ids; ConvertError for a damaged file and for other models than BPE."""
    pieces, model_type = [], _UNIGRAM
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                model_type = next((v for n, v in _fields(value) if n == 3 and isinstance(v, int)), _UNIGRAM)
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, IndexError, struct.error):
        raise ConvertError(f"{path}: is no SentencePiece model, or damaged; fetch it again") from None
    if not pieces:
        raise ConvertError(f"{path}: is no SentencePiece model: it holds no pieces")
    if model_type != _BPE:
        raise ConvertError(f"{path}: is a SentencePiece model of type {model_type}; only BPE ({_BPE}) is supported")
    return pieces


def _piece(message: bytes) -> Piece:
    text, score, kind = "", 0.0, PieceKind.NORMAL
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = PieceKind(value)
    return Piece(text, score, kind)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message; fixed-width numbers stay bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}.get(wire, -1)
        if size < 0 or at + size > len(message):
            raise ValueError(f"field of wire type {wire} at byte {at}")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
