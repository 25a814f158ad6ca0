"""pyinfer: run any GGUF model, quantized, with paged KV and continuous batching."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyinfer.errors import PyinferError as PyinferError
    from pyinfer.runtime.beam_search_params import BeamSearchParams as BeamSearchParams
    from pyinfer.runtime.llm import LLM as LLM
    from pyinfer.runtime.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "BeamSearchParams", "PyinferError", "SamplingParams", "__version__"]

_HOME = {
    "LLM": "pyinfer.runtime.llm",
    "BeamSearchParams": "pyinfer.runtime.beam_search_params",
    "SamplingParams": "pyinfer.runtime.sampling_params",
    "PyinferError": "pyinfer.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pyinfer' has no attribute {name!r}")
