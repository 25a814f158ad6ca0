"""The formats: GGUF reading, one codec a block type, `QuantTensor`."""
