"""How fast memory can be read: the limit of decoding, which reads every weight once for a token."""

from __future__ import annotations

import threading
import time

import numpy as np

_BYTES = 256 << 20  # well over any cache, small enough for any machine that runs a model
_REPEATS = 3


def read_bandwidth(n_threads: int) -> float:
    """GB/s (10^9) that `n_threads` threads read together, the best of a few passes over 256 MiB; about 0.1 s."""
    data = np.ones(_BYTES // 8, np.int64)
    shares = np.array_split(data, n_threads)
    best = min(_timed_pass(shares) for _ in range(_REPEATS))
    return data.nbytes / best / 1e9


def _timed_pass(shares: list[np.ndarray]) -> float:
    """Seconds from the start of the threads' reading to the end of the last; NumPy's reduction runs without the GIL."""
    start = threading.Barrier(len(shares) + 1)

    def read(share: np.ndarray) -> None:
        start.wait()
        np.bitwise_or.reduce(share)

    threads = [threading.Thread(target=read, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    start.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin
