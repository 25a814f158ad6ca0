"""What NVRTC makes of the kernels, PTX, run on the CPU instruction by instruction: a second witness beside `cuda_emulator`."""
