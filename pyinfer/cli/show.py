"""`pyinfer show`: what a model file holds."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyinfer.cli.console import print_facts, print_table

if TYPE_CHECKING:
    from pyinfer.quant.gguf import GGUFFile
    from pyinfer.runtime.model_info import ModelInfo

_LONG_ARRAY = 64  # longer ones (vocabularies) are given by their length in JSON


def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A path, a name, pypi:PACKAGE or npm:PACKAGE.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Show what a model file holds."""
    from pyinfer.cli.progress import terminal_progress
    from pyinfer.quant.gguf import GGUFFile
    from pyinfer.runtime.hub import resolve
    from pyinfer.runtime.model_info import model_info

    with GGUFFile.open(resolve(model, terminal_progress())) as file:
        info = model_info(file)
        if as_json:
            print(json.dumps(_as_json(file, info), indent=2, allow_nan=False))
            return
        _print_info(info)
        if tensors:
            rows = [
                (t.name, t.codec.name, " x ".join(map(str, t.shape)), f"{t.n_bytes:,}") for t in file.tensors.values()
            ]
            print()
            print_table(("tensor", "type", "shape", "bytes"), rows, right=("bytes",))


def _print_info(info: ModelInfo) -> None:
    from pyinfer.runtime.sizes import format_size

    heads = f"{info.n_heads}, {info.n_kv_heads} for keys and values" if info.n_kv_heads is not None else info.n_heads
    n_tensors = sum(share.n_tensors for share in info.types)
    mix = ", ".join(f"{share.n_tensors} {share.type}" for share in info.types)
    print_facts(
        "Model",
        [
            ("name", info.name),
            ("architecture", info.architecture),
            ("parameters", _all_and_active(info)),
            ("file", info.path),
            ("size", f"{format_size(info.size)} (GGUF v{info.gguf_version})"),
            ("quantization", f"{info.file_type or 'not stated'}; {n_tensors} tensors: {mix}"),
            ("licence", " ".join(filter(None, (info.licence, info.licence_link))) or "not stated"),
        ],
    )
    print_facts(
        "Shape",
        [
            ("context", info.n_ctx_train),
            ("layers", info.n_layers),
            ("embedding", info.n_embd),
            ("feed forward", info.n_ff),
            ("experts", _experts(info)),
            ("heads", heads),
            ("head size", info.head_dim),
            ("sliding window", info.sliding_window),
            ("rope base", f"{info.rope_freq_base:.10g}" if info.rope_freq_base is not None else None),
        ],
    )
    print_facts(
        "Text",
        [
            ("tokenizer", ", ".join(filter(None, (info.tokenizer_model, info.tokenizer_pre))) or "none"),
            ("vocabulary", info.n_vocab),
            ("chat template", ", ".join(info.chat_templates) or "none"),
        ],
    )


def _all_and_active(info: ModelInfo) -> str:
    active = f", {_parameters(info.n_params_active)} for a token" if info.n_params_active < info.n_params else ""
    return _parameters(info.n_params) + active


def _experts(info: ModelInfo) -> str | None:
    if not info.n_experts:
        return None
    width = f", each {info.expert_n_ff} wide" if info.expert_n_ff is not None else ""
    return f"{info.n_experts}, {info.n_experts_used} for a token{width}"


def _parameters(n: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= limit:
            return f"{n / limit:.2f} {unit}"
    return str(n)


def _as_json(file: GGUFFile, info: ModelInfo) -> dict[str, Any]:
    return {
        **dataclasses.asdict(info),
        "path": str(info.path),
        "model_type": info.model_type,
        "rope_freq_base": _plain(info.rope_freq_base),
        "metadata": {key: _plain(value) for key, value in file.metadata.items()},
        "tensors": [
            {"name": t.name, "type": t.codec.name, "shape": list(t.shape), "bytes": t.n_bytes}
            for t in file.tensors.values()
        ],
    }


def _plain(value: Any) -> Any:
    """A metadata value as JSON has it: no NaN, long arrays by their length."""
    if hasattr(value, "tolist"):
        value = value.tolist() if len(value) <= _LONG_ARRAY else {"length": len(value), "type": str(value.dtype)}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        if len(value) > _LONG_ARRAY:
            return {"length": len(value), "type": type(value[0]).__name__}
        return [_plain(item) for item in value]
    return value
