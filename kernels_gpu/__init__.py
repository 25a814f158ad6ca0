"""The GPU backend: `.cu` files compiled by NVRTC, lowered graphs as lists of launches. CuPy is imported by one file only."""
