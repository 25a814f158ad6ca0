"""The GPU backend. Not built yet: `open_backend("gpu")` says so."""
