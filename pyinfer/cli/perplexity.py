"""`pyinfer perplexity`: how well a model predicts a text, as llama-perplexity measures it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from pyinfer.cli.options import EngineOptions, with_some_engine_options
from pyinfer.cli.scoring import (
    check_same_vocabulary,
    open_scorer,
    print_comparison,
    print_perplexity,
    read_text,
    tell_chunks,
)


@with_some_engine_options("threads", "kv_cache_dtype")
def perplexity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A path, a name, pypi:PACKAGE or npm:PACKAGE.")],
    text: Annotated[Path, typer.Option("-f", "--file", metavar="FILE", help="The text.")],
    n_ctx: Annotated[int, typer.Option("-c", "--ctx-size", min=4, metavar="N", help="Tokens in a chunk.")] = 512,
    chunks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use the first N chunks only.", show_default="all")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--kl-divergence", metavar="BASE", help="Also the distance to this model, such as the original."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
    *,
    engine: EngineOptions,
) -> None:
    """Measure how well a model predicts a text: lower is better."""
    from pyinfer.cli.progress import terminal_progress
    from pyinfer.runtime.hub import resolve
    from pyinfer.runtime.perplexity import compare, measure, text_chunks

    content = read_text(text)
    progress = terminal_progress()
    sizes = (n_ctx, engine.n_threads, engine.kv_cache_dtype)
    with open_scorer(resolve(model, progress), *sizes) as llm:
        pieces = text_chunks(llm.model.tokenizer, content, n_ctx, chunks)
        on_chunk = tell_chunks(progress, len(pieces))
        if base is None:
            result = measure(llm, pieces, on_chunk)
            if not as_json:
                print_perplexity(result)
        else:
            with open_scorer(resolve(base, progress), *sizes) as base_llm:
                check_same_vocabulary(base_llm, llm)
                comparison = compare(base_llm, llm, pieces, on_chunk)
            if not as_json:
                print_comparison(comparison)
    if as_json:
        print(json.dumps(dataclasses.asdict(result if base is None else comparison), indent=2))
