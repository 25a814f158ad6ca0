"""CUDA on the CPU: the kernels of `kernels_gpu/cuda` compiled by g++ and run thread by thread, for tests without a GPU."""
