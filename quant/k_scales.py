"""The 12 bytes in which Q4_K and Q5_K keep eight 6-bit scales and eight 6-bit minimums.

Bytes 0..3: scales 0..3 in the low six bits, above them the high two bits of scales 4..7; bytes 4..7: the minimums
likewise; bytes 8..11: low four bits of scales 4..7 in the low nibble, of minimums 4..7 in the high nibble.
"""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray


def unpack_scales(packed: ByteArray) -> tuple[ByteArray, ByteArray]:
    """(scales (n, 8), minimums (n, 8)), values 0..63, of bytes (n, 12)."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 0x3F, (third & 0x0F) | ((first >> 6) << 4)], axis=-1)
    minimums = np.concatenate([second & 0x3F, (third >> 4) | ((second >> 6) << 4)], axis=-1)
    return scales, minimums


def pack_scales(scales: ByteArray, minimums: ByteArray) -> ByteArray:
    """The inverse of `unpack_scales`."""
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minimums[:, :4] | ((minimums[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 0x0F) | ((minimums[:, 4:] & 0x0F) << 4)
    return np.concatenate([first, second, third], axis=-1)
