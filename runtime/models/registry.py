"""Architecture name -> builder. A new architecture is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from pyinfer.errors import ModelError
from pyinfer.graph.graph import Graph
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models import gemma3, llama, phi3, qwen2, qwen2moe, qwen3
from pyinfer.runtime.models.common import ModelReader

ARCHITECTURES: MappingProxyType[str, Callable[[ModelReader], Graph]] = MappingProxyType(
    {
        "llama": llama.build,
        "qwen2": qwen2.build,
        "qwen2moe": qwen2moe.build,
        "qwen3": qwen3.build,
        "qwen3moe": qwen3.build_moe,
        "gemma3": gemma3.build,
        "phi3": phi3.build,
    }
)


def build_graph(file: GGUFFile) -> Graph:
    """The model of a GGUF as a graph, not yet optimized; ModelError for anything that it cannot be run as."""
    arch = file.metadata.get("general.architecture")
    build = ARCHITECTURES.get(arch) if isinstance(arch, str) else None
    if build is None:
        raise ModelError(f"{file.path.name}: architecture {arch!r} is not known; known: {', '.join(ARCHITECTURES)}")
    assert isinstance(arch, str)
    return build(ModelReader(file, arch))
