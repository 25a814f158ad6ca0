"""`pyinfer convert`: a Hugging Face checkpoint as a GGUF."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from pyinfer.cli.common import checked
from pyinfer.cli.console import print_facts
from pyinfer.convert.file_types import file_type
from pyinfer.runtime.sizes import format_size

_N_TEXTS = 1000


def convert(
    folder: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="Folder with config.json, *.safetensors and the tokenizer.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.gguf", help="The file to write.", show_default=False)
    ] = None,
    type_name: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="TYPE",
            callback=checked(lambda text: text.lower() == "auto" or file_type(text)),
            help="auto (the checkpoint's own), f32, f16, bf16, q8_0, q4_k_m, ...",
        ),
    ] = "auto",
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The model's name in the file.", show_default=False)
    ] = None,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option("--pre-tokenizer", metavar="NAME", help="How BPE splits text, if that is not recognized."),
    ] = None,
    verify_tokenizer: Annotated[
        bool, typer.Option("--verify-tokenizer", help="Compare 1,000 texts with the checkpoint's own tokenizer first.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show what would be written.")] = False,
) -> None:
    """Convert a Hugging Face checkpoint to a GGUF, quantized on the way if TYPE says so."""
    from pyinfer.cli.progress import terminal_progress
    from pyinfer.convert.conversion import plan_conversion

    progress = terminal_progress()
    conversion = plan_conversion(folder, type_name, name=name, pre_tokenizer=pre_tokenizer)
    path = output or Path(f"{folder.resolve().name}-{conversion.file_type.name}.gguf")
    for note in conversion.notes:
        progress.say(f"note: {note}")
    if verify_tokenizer:
        _verify(folder, conversion.metadata)
        progress.say(f"tokenizer: {_N_TEXTS:,} texts have the same ids and come back the same")
    if not dry_run:
        progress.begin(f"writing {path}", conversion.n_bytes)
        try:
            conversion.write(path, progress.update)
        finally:
            progress.end()
    print_facts(
        "would write" if dry_run else "wrote",
        (
            ("file", path),
            ("architecture", conversion.metadata["general.architecture"]),
            ("type", conversion.file_type.name),
            ("size", format_size(conversion.n_bytes)),
            ("bits per weight", f"{8 * conversion.n_bytes / conversion.n_parameters:.2f}"),
            ("tensors", len(conversion.tensors)),
        ),
    )


def _verify(folder: Path, metadata: dict[str, Any]) -> None:
    """Load the vocabulary as any reader of the file would, before a weight is written."""
    from pyinfer.convert.tokenizer_check import check_tokenizer
    from pyinfer.quant.writer import write_gguf
    from pyinfer.runtime.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "vocabulary.gguf"
        write_gguf(path, metadata, {})
        tokenizer = load_tokenizer(path)
    check_tokenizer(folder, lambda text: tokenizer.encode(text, add_special=False), tokenizer.decode, n_texts=_N_TEXTS)
