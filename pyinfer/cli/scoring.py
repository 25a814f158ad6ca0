"""What perplexity, imatrix and quantize --report share: the text, a model that scores it, how results are shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pyinfer.cli.console import print_facts
from pyinfer.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from pyinfer.runtime.llm import LLM
    from pyinfer.runtime.perplexity import Comparison, Perplexity
    from pyinfer.runtime.progress import Progress


def read_text(path: Path) -> str:
    """The text of a file, which must be UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", param="file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}", param="file") from None


def open_scorer(path: Path, n_ctx: int, n_threads: int | None = None, kv_cache_dtype: str = "f16") -> LLM:
    """A model that runs one sequence of n_ctx tokens at a time."""
    from pyinfer.runtime.llm import LLM

    return LLM(
        path,
        n_ctx=n_ctx,
        n_threads=n_threads,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )


def tell_chunks(progress: Progress, n_chunks: int) -> Callable[[int, float], None]:
    """Tells now and then how far a measurement is and what it has found so far."""
    step = max(1, n_chunks // 10)

    def on_chunk(done: int, perplexity: float) -> None:
        if done % step == 0 and done < n_chunks:
            progress.say(f"chunk {done} of {n_chunks}: perplexity {perplexity:.4f}")

    return on_chunk


def check_same_vocabulary(base: LLM, model: LLM) -> None:
    """ModelError for two models whose probabilities are not over the same tokens."""
    a, b = base.model.tokenizer, model.model.tokenizer
    if a.n_vocab != b.n_vocab or any(a.token_bytes(i) != b.token_bytes(i) for i in range(0, a.n_vocab, 97)):
        raise ModelError(f"the models have different vocabularies ({a.n_vocab} and {b.n_vocab} tokens); compare others")


def print_perplexity(result: Perplexity) -> None:
    print_facts(
        "Perplexity",
        [("perplexity", f"{result.value:.4f} ± {result.error:.4f}"), ("tokens scored", f"{result.n_tokens:,}")],
    )


def print_comparison(result: Comparison) -> None:
    divergence, agreement = result.kl_divergence, result.top1_agreement
    print_facts(
        "Against the base",
        [
            ("perplexity", f"{result.model.value:.4f} ± {result.model.error:.4f}"),
            ("of the base", f"{result.base.value:.4f} ± {result.base.error:.4f}"),
            (
                "KL divergence",
                f"{divergence.mean:.6f} ± {divergence.error:.6f}, at most {result.max_kl_divergence:.4f}",
            ),
            ("same best token", f"{100 * agreement.mean:.2f} ± {100 * agreement.error:.2f} %"),
            ("tokens scored", f"{result.model.n_tokens:,}"),
        ],
    )
