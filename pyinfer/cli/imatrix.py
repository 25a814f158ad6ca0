"""`pyinfer imatrix`: how much each column of a model's matrices matters, measured on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyinfer.cli.console import print_facts


def imatrix(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A path, a name, pypi:PACKAGE or npm:PACKAGE.")],
    text: Annotated[Path, typer.Option("-f", "--file", metavar="FILE", help="The text, such as the model will see.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.gguf", help="The file to write.")] = Path(
        "imatrix.gguf"
    ),
    n_ctx: Annotated[int, typer.Option("-c", "--ctx-size", min=4, metavar="N", help="Tokens in a chunk.")] = 512,
    chunks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use the first N chunks only.", show_default="all")
    ] = None,
) -> None:
    """Measure an importance matrix for 'pyinfer quantize --imatrix'."""
    import numpy as np

    from pyinfer.cli.progress import terminal_progress
    from pyinfer.cli.scoring import read_text
    from pyinfer.convert.importance_matrix import ImportanceMatrix
    from pyinfer.quant.gguf import GGUFFile
    from pyinfer.runtime.activation_sums import activation_sums
    from pyinfer.runtime.hub import resolve
    from pyinfer.runtime.perplexity import text_chunks
    from pyinfer.runtime.tokenizer import load_tokenizer

    content = read_text(text)
    progress = terminal_progress()
    with GGUFFile.open(resolve(model, progress)) as file:
        pieces = text_chunks(load_tokenizer(file), content, n_ctx, chunks)
        progress.say(f"running {len(pieces)} chunks of {n_ctx} tokens")
        sums = activation_sums(file, pieces, lambda done: progress.say(f"chunk {done} of {len(pieces)}"))
    matrix = ImportanceMatrix(
        {name: values.astype(np.float32) for name, values in sums.squares.items()},
        {name: n.astype(np.float32) for name, n in sums.n_rows.items()},
        (text.name,),
        len(pieces),
        n_ctx,
    )
    matrix.save(output)
    print_facts("wrote", [("file", output), ("matrices", len(matrix.sums)), ("tokens", f"{len(pieces) * n_ctx:,}")])
