"""What every block type is: a fixed number of weights stored in a fixed number of bytes.

A codec is the specification of its type in NumPy; the kernels are checked against it.
Block layouts follow ggml's `ggml-common.h`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pyinfer.errors import ModelError

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

_WEIGHTS_PER_CHUNK = 1 << 16  # temporaries of this many weights stay in the L2 cache


class Codec(ABC):
    """One GGML tensor type. Instances carry no state; they live in `pyinfer.quant.codecs`."""

    name: ClassVar[str]  # as ggml spells it in capitals: 'Q4_K'
    type_id: ClassVar[int]  # ggml's number, as stored in a file
    block_size: ClassVar[int]  # weights in a block
    block_bytes: ClassVar[int]
    wide_fields: ClassVar[tuple[tuple[int, int, int], ...]] = ()  # (offset, bytes an item, items): all that swaps
    supported: ClassVar[bool] = True  # False: the geometry is known, the contents are not

    @abstractmethod
    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        """Weights (n, block_size) of blocks (n, block_bytes)."""

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        """Blocks (n, block_bytes) of weights (n, block_size)."""
        raise ModelError(f"cannot quantize to {self.name}: this type can only be read")

    @property
    def can_quantize(self) -> bool:
        return type(self)._quantize_blocks is not Codec._quantize_blocks

    @property
    def bits_per_weight(self) -> float:
        return self.block_bytes * 8 / self.block_size

    def row_bytes(self, n_weights: int) -> int:
        """Bytes of a row of `n_weights`, which must be a multiple of the block size."""
        if n_weights % self.block_size:
            raise ModelError(f"a row of {n_weights} weights is no multiple of {self.name}'s block of {self.block_size}")
        return n_weights // self.block_size * self.block_bytes

    def dequantize(self, data: ByteArray) -> FloatArray:
        """Weights (..., n) of bytes (..., n // block_size * block_bytes)."""
        if data.shape[-1] % self.block_bytes:
            raise ModelError(
                f"{data.shape[-1]} bytes are no multiple of {self.name}'s block of {self.block_bytes} bytes"
            )
        shape = (*data.shape[:-1], data.shape[-1] // self.block_bytes * self.block_size)
        blocks = data.reshape(-1, self.block_bytes)
        out = np.empty((len(blocks), self.block_size), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # a block may hold an infinite or NaN scale
            for part in self._chunks(len(blocks)):
                out[part] = self._dequantize_blocks(blocks[part])
        return out.reshape(shape)

    def quantize(self, weights: npt.ArrayLike) -> ByteArray:
        """Bytes (..., n // block_size * block_bytes) of weights (..., n).

        ModelError where the type can only be read, and for weights that are not finite (plain floats take any).
        """
        values = np.ascontiguousarray(weights, dtype=np.float32)
        if self.block_size > 1 and not np.isfinite(values).all():
            raise ModelError(f"cannot quantize to {self.name}: a weight is NaN or infinite")
        shape = (*values.shape[:-1], self.row_bytes(values.shape[-1]))
        blocks = values.reshape(-1, self.block_size)
        out = np.empty((len(blocks), self.block_bytes), np.uint8)
        for part in self._chunks(len(blocks)):
            out[part] = self._quantize_blocks(blocks[part])
        return out.reshape(shape)

    def swap_bytes(self, data: ByteArray) -> ByteArray:
        """A copy of `data` (..., whole blocks) in the other byte order."""
        out = data.copy()
        blocks = out.reshape(-1, self.block_bytes)
        for offset, size, items in self.wide_fields:
            field = blocks[:, offset : offset + size * items].reshape(-1, items, size)
            blocks[:, offset : offset + size * items] = field[:, :, ::-1].reshape(-1, items * size)
        return out

    def _chunks(self, n_blocks: int) -> list[slice]:
        step = max(1, _WEIGHTS_PER_CHUNK // self.block_size)
        return [slice(i, i + step) for i in range(0, n_blocks, step)]

    def __repr__(self) -> str:
        return f"<codec {self.name}: {self.block_size} weights in {self.block_bytes} bytes>"


def half(field: ByteArray) -> FloatArray:
    """float32 (n, k) of float16 fields stored in bytes (n, 2k)."""
    return field.view(np.float16).astype(np.float32)


def half_bytes(values: FloatArray) -> ByteArray:
    """Bytes (n, 2k) of values (n, k) rounded to float16; what overflows becomes infinity, as in ggml."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint8)


def nibbles(packed: ByteArray, run: int) -> ByteArray:
    """Codes (n, 2m) of bytes (n, m): each `run` bytes hold `run` low nibbles, then `run` high nibbles."""
    runs = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([runs & np.uint8(0x0F), runs >> np.uint8(4)], axis=2).reshape(len(packed), -1)


def pack_nibbles(codes: ByteArray, run: int) -> ByteArray:
    """The inverse of `nibbles`, for codes 0..15."""
    runs = codes.reshape(len(codes), -1, 2, run)
    return (runs[:, :, 0] | (runs[:, :, 1] << np.uint8(4))).reshape(len(codes), -1)
