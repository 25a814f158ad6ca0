"""The op vocabulary, `Graph`, rewriting passes and the NumPy reference interpreter."""
