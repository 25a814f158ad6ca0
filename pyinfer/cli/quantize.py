"""`pyinfer quantize`: a GGUF with smaller weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyinfer.cli.common import checked
from pyinfer.cli.console import print_facts
from pyinfer.cli.options import EngineOptions, with_some_engine_options
from pyinfer.errors import ConfigError

if TYPE_CHECKING:
    from pyinfer.convert.quantize import Quantization


def parse_tensor_type(text: str) -> tuple[str, str]:
    """'attn_v=q6_k' as a regular expression and a type."""
    pattern, equals, type_name = text.rpartition("=")
    if not equals or not pattern or not type_name:
        raise ConfigError(f"{text!r} is not REGEX=TYPE, such as attn_v=q6_k", param="tensor_type")
    return pattern, type_name


def _check_type(text: str) -> object:
    from pyinfer.convert.file_types import file_type

    return file_type(text)


def _check_tensor_types(ctx: typer.Context, values: list[str] | None) -> list[str] | None:
    for value in values or []:
        checked(parse_tensor_type)(value)
    return values


@with_some_engine_options("threads")
def quantize(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="The model: a path, a name, pypi:PACKAGE or npm:PACKAGE.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    type_name: Annotated[
        str, typer.Argument(metavar="TYPE", callback=checked(_check_type), help="Q4_K_M, Q8_0, F16, ...")
    ],
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance matrix, of 'pyinfer imatrix'.", show_default=False)
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=TYPE", callback=_check_tensor_types, help="Another type for these tensors; may be repeated."
        ),
    ] = None,
    output_type: Annotated[
        str | None, typer.Option("--output-type", "--output-tensor-type", metavar="TYPE", help="Type of output.weight.")
    ] = None,
    token_embedding_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of the token embeddings.")
    ] = None,
    pure: Annotated[bool, typer.Option("--pure", help="The same type for all matrices, no mix.")] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Also from weights that are quantized already.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show sizes and types, write nothing.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help="Compare with IN on this text and store the result.", show_default=False),
    ] = None,
    max_kld: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="X", help="With --report: fail if the KL divergence is above X, write nothing."),
    ] = None,
    *,
    engine: EngineOptions,
) -> None:
    """Write a model with smaller weights."""
    from pyinfer.cli.progress import terminal_progress
    from pyinfer.convert.importance_matrix import ImportanceMatrix
    from pyinfer.convert.quantize import plan_quantization
    from pyinfer.convert.type_plan import PlanOptions
    from pyinfer.quant.gguf import GGUFFile
    from pyinfer.runtime.hub import resolve

    if max_kld is not None and report is None:
        raise ConfigError("--max-kld needs a text to measure on; give --report TEXT", param="max_kld")
    options = PlanOptions(
        pure=pure,
        output_type=output_type,
        token_embedding_type=token_embedding_type,
        tensor_types=tuple(parse_tensor_type(text) for text in tensor_type or []),
    )
    progress = terminal_progress()
    with GGUFFile.open(resolve(source, progress)) as file:
        plan = plan_quantization(
            file,
            type_name,
            options,
            imatrix=None if imatrix is None else ImportanceMatrix.load(imatrix),
            allow_requantize=allow_requantize,
            n_threads=engine.n_threads,
        )
        for planned, n in Counter(plan.fallbacks.values()).items():
            progress.say(f"note: {n} tensors are {planned.codec}: their rows do not fill blocks of {planned.wanted}")
        if dry_run:
            _print_plan(plan, output, "would write")
            return
        if report is None:
            progress.begin(f"quantizing to {output}", plan.n_bytes)
            try:
                plan.write(output, progress.update)
            finally:
                progress.end()
            _print_plan(plan, output, "wrote")
            return
        from pyinfer.cli.quality_report import write_with_report
        from pyinfer.cli.scoring import print_comparison

        result = write_with_report(plan, output, report, max_kld=max_kld, n_threads=engine.n_threads, progress=progress)
        _print_plan(plan, output, "wrote")
        print_comparison(result)


def _print_plan(plan: Quantization, output: Path, title: str) -> None:
    from pyinfer.runtime.sizes import format_size

    counts = Counter(planned.codec for planned in plan.types.values())
    print_facts(
        title,
        [
            ("file", output),
            ("type", plan.target.name),
            ("tensors", ", ".join(f"{n} {name}" for name, n in counts.most_common())),
            ("size", f"{format_size(plan.n_bytes)}, from {format_size(plan.n_source_bytes)}"),
            ("bits per weight", f"{plan.bits_per_weight:.2f}"),
        ],
    )
