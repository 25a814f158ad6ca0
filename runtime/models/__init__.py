"""Model architectures: each file turns GGUF metadata and tensors into a `Graph`."""
