"""Numba kernels, the thread pool and the lowering of a graph to a CPU program."""
