"""Offline conversion and quantization. Not built yet."""
