"""`pyinfer quantize --report`: the quantized model against its source on a text, before the file gets its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyinfer.cli.scoring import open_scorer, read_text, tell_chunks
from pyinfer.errors import ConvertError

if TYPE_CHECKING:
    from pyinfer.convert.quantize import Quantization
    from pyinfer.runtime.llm import LLM
    from pyinfer.runtime.perplexity import Comparison
    from pyinfer.runtime.progress import Progress

_LONGEST_CHUNK = 512


def write_with_report(
    quantization: Quantization,
    path: Path,
    text: Path,
    *,
    max_kld: float | None,
    n_threads: int | None,
    progress: Progress,
) -> Comparison:
    """Write the file with what the comparison found in its metadata.

    ConvertError, and no file, if the KL divergence is above `max_kld`.
    """
    from pyinfer.runtime.perplexity import compare, text_chunks
    from pyinfer.runtime.tokenizer import load_tokenizer

    content = read_text(text)
    tokenizer = load_tokenizer(quantization.source)
    context = int(quantization.metadata.get(f"{quantization.metadata['general.architecture']}.context_length", 0))
    n_ctx = max(4, min(_LONGEST_CHUNK, context or _LONGEST_CHUNK, len(tokenizer.encode(content)) // 2))
    chunks = text_chunks(tokenizer, content, n_ctx)
    with (
        _written(quantization, path, progress) as partial,
        open_scorer(partial, n_ctx, n_threads) as model,
        open_scorer(quantization.source.path, n_ctx, n_threads) as base,
    ):
        progress.say(f"comparing over {len(chunks)} chunks of {n_ctx} tokens")
        result = compare(base, model, chunks, tell_chunks(progress, len(chunks)))
        divergence = result.kl_divergence.mean
        if max_kld is not None and not divergence <= max_kld:
            raise ConvertError(
                f"{path}: not written: its KL divergence is {divergence:.6f}, above --max-kld {max_kld}; choose a type "
                "with more bits or give an imatrix"
            )
        _name(quantization, model, path, _metadata(quantization, result, text))
    return result


def _metadata(quantization: Quantization, result: Comparison, text: Path) -> dict[str, Any]:
    return {
        "pyinfer.report.text": text.name,
        "pyinfer.report.tokens": result.model.n_tokens,
        "pyinfer.report.kl_divergence": result.kl_divergence.mean,
        "pyinfer.report.max_kl_divergence": result.max_kl_divergence,
        "pyinfer.report.perplexity": result.model.value,
        "pyinfer.report.source_perplexity": result.base.value,
        "pyinfer.report.top1_agreement": result.top1_agreement.mean,
        "pyinfer.report.bits_per_weight": quantization.bits_per_weight,
    }


@contextmanager
def _written(quantization: Quantization, path: Path, progress: Progress) -> Iterator[Path]:
    """A file to measure: on Linux it loses its name at once, so that whatever happens nothing is left."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.report")
    try:
        progress.begin(f"quantizing to {path}", quantization.n_bytes)
        try:
            quantization.write(partial, progress.update, name=path)
        finally:
            progress.end()
        if not os.path.isdir("/proc/self/fd"):
            yield partial
            return
        with partial.open("rb") as file:
            partial.unlink()
            yield Path(f"/proc/self/fd/{file.fileno()}")
    finally:
        partial.unlink(missing_ok=True)


def _name(quantization: Quantization, model: LLM, path: Path, extra: dict[str, Any]) -> None:
    quantization.made(model.model.file, extra).write(path)
