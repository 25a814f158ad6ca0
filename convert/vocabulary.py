"""A checkpoint's tokenizer as `tokenizer.*` metadata: which of its files count, and what every family adds."""

from __future__ import annotations

from typing import Any

from pyinfer.convert import vocabulary_json, vocabulary_spm
from pyinfer.convert.family import Family
from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.convert.hf_config import HFConfig
from pyinfer.convert.special_tokens import special_metadata
from pyinfer.convert.vocabulary_table import VocabularyTable
from pyinfer.errors import ConvertError

_CODE_LLAMA = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
_CODE_LLAMA_VOCAB, _SMOL_VOCAB = 32016, 49152


def vocabulary_metadata(
    checkpoint: HFCheckpoint,
    family: Family,
    config: HFConfig,
    pre_tokenizer: str | None = None,
    notes: list[str] | None = None,
) -> dict[str, Any]:
    """All keys `tokenizer.*`. `pre_tokenizer` names the pre-tokenizer instead of its fingerprint.

    Added tokens that the model has no row for are left out, with a remark in `notes`.
    """
    try:
        table = _table(checkpoint, family, pre_tokenizer)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _damaged(checkpoint, error) from error
    n_vocab = config.integer("vocab_size", len(table.tokens))
    beyond = table.drop_added(n_vocab)
    if beyond and notes is not None:
        notes.append(f"{len(beyond)} added tokens that the model has no row for are left out, such as {beyond[0]!r}")
    table.resize(n_vocab)
    try:
        metadata = {**table.metadata(), **special_metadata(checkpoint, n_vocab)}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _damaged(checkpoint, error) from error
    if family.arch == "llama":
        metadata |= _llama_specials(n_vocab)
    if family.vocabulary == "wordpiece":
        metadata["tokenizer.ggml.token_type_count"] = config.integer("type_vocab_size", 1)
    return metadata


def _damaged(checkpoint: HFCheckpoint, error: Exception) -> ConvertError:
    return ConvertError(
        f"{checkpoint.folder}: tokenizer.json, tokenizer_config.json or added_tokens.json is damaged ({error!r}); "
        "fetch the tokenizer again"
    )


def _table(checkpoint: HFCheckpoint, family: Family, pre_tokenizer: str | None) -> VocabularyTable:
    if family.vocabulary == "wordpiece":
        return vocabulary_json.wordpiece(checkpoint, pre_tokenizer)
    is_gpt2 = checkpoint.json("tokenizer_config.json").get("tokenizer_class") == "GPT2Tokenizer"
    if checkpoint.has("tokenizer.model") and not is_gpt2:
        return vocabulary_spm.from_model(checkpoint, family)
    if checkpoint.has("tokenizer.json") or checkpoint.has("vocab.json"):
        if vocabulary_spm.is_sentencepiece(checkpoint.json("tokenizer.json")):
            return vocabulary_spm.from_json(checkpoint, family)
        return vocabulary_json.byte_level(checkpoint, pre_tokenizer)
    hint = ""
    if checkpoint.has("tekken.json"):
        hint = "; its tekken.json is Mistral's own format: take the files of the model's transformers version"
    raise ConvertError(
        f"{checkpoint.folder}: has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json and merges.txt){hint}"
    )


def _llama_specials(n_vocab: int) -> dict[str, Any]:
    """What two families of checkpoints need and do not say: Code Llama's infill tokens, SmolLM's missing BOS."""
    if n_vocab == _CODE_LLAMA_VOCAB:
        return {f"tokenizer.ggml.{name}_token_id": i for name, i in _CODE_LLAMA.items()}
    return {"tokenizer.ggml.add_bos_token": False} if n_vocab == _SMOL_VOCAB else {}
