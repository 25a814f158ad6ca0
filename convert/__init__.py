"""Offline: Hugging Face checkpoints to GGUF, and quantization."""
