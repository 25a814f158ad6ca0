"""Folders with every kind of special-token setting, and what llama.cpp's gguf-py makes of them.

To make the answers again: `PYTHONPATH=tests/support:LLAMA_CPP/gguf-py python tests/support/special_vocab.py`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

ANSWERS = Path(__file__).parents[1] / "data" / "special_vocab.json"  # case -> the keys that gguf-py writes
N_VOCAB = 100
_ADDED = ["<s>", "</s>", "<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "<|end|>", "<|eot|>"]
_A, _B = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}


def _token(text: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": 0}}


def _tokenizer(post: dict[str, Any] | None = None, normalizer: dict[str, Any] | None = None) -> dict[str, Any]:
    added = [{"id": 10 + i, "content": text, "special": True} for i, text in enumerate(_ADDED)]
    return {"added_tokens": added, "post_processor": post, "normalizer": normalizer, "model": {"type": "BPE"}}


def _template(single: list[dict[str, Any]], pair: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": single, "pair": pair}


_BERT = _template([_token("[CLS]"), _A, _token("[SEP]")], [_token("[CLS]"), _A, _token("[SEP]"), _B, _token("[SEP]")])
_BERT_NAMES = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "<pad>", "mask_token": "[MASK]"}
_LLAMA = _template([_token("<s>"), _A], [_token("<s>"), _A, _token("<s>"), _B])
_NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
_TEMPLATES = [{"name": "default", "template": "plain"}, {"name": "tool use", "template": "tools"}]

# case -> file -> content (text, or an object written as JSON)
CASES: dict[str, dict[str, Any]] = {
    "llama 3": {"tokenizer.json": _tokenizer(_LLAMA), "tokenizer_config.json": _NAMES, "config.json": {}},
    "bert": {
        "tokenizer.json": _tokenizer(_BERT, {"type": "BertNormalizer", "lowercase": True, "strip_accents": None}),
        "tokenizer_config.json": _BERT_NAMES,
        "config.json": {"pad_token_id": 0},
    },
    "roberta": {
        "tokenizer.json": _tokenizer({"type": "RobertaProcessing", "sep": ["</s>", 11], "cls": ["<s>", 10]}),
        "tokenizer_config.json": {**_NAMES, "sep_token": "</s>", "cls_token": "<s>"},
        "config.json": {},
    },
    "byte level": {
        "tokenizer.json": _tokenizer({"type": "ByteLevel"}),
        "tokenizer_config.json": {"eos_token": {"content": "<|end|>"}, "pad_token": "<pad>", "add_bos_token": False},
        "config.json": {"bos_token_id": 3, "eos_token_id": [4, 5]},
    },
    "sequence of processors": {
        "tokenizer.json": _tokenizer({"type": "Sequence", "processors": [{"type": "ByteLevel"}, _LLAMA]}),
        "tokenizer_config.json": _NAMES,
        "config.json": {},
    },
    "ends with another token than eos": {
        "tokenizer.json": _tokenizer(
            _template([_token("<s>"), _A, _token("<|end|>")], [_token("<s>"), _A, _B, _token("<|end|>")])
        ),
        "tokenizer_config.json": _NAMES,
        "config.json": {},
    },
    "separator between": {
        "tokenizer.json": _tokenizer(_template([_A], [_A, _token("</s>"), _B])),
        "tokenizer_config.json": _NAMES,
        "config.json": {},
    },
    "unknown first token": {
        "tokenizer.json": _tokenizer(_template([_token("<|eot|>"), _A], [_token("<|eot|>"), _A, _B])),
        "tokenizer_config.json": {**_NAMES, "cls_token": "[CLS]"},
        "config.json": {},
    },
    "only config.json": {
        "tokenizer_config.json": {"add_bos_token": True, "add_eos_token": False},
        "config.json": {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 1000},
    },
    "nested config": {
        "tokenizer_config.json": {},
        "config.json": {"text_config": {"bos_token_id": 1}, "eos_token_id": 2},
    },
    "normalizers": {
        "tokenizer.json": _tokenizer(
            normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "StripAccents"}]}
        ),
        "tokenizer_config.json": {},
        "config.json": {},
    },
    "one chat template": {"tokenizer_config.json": {"chat_template": "one"}, "config.json": {}},
    "named chat templates": {"tokenizer_config.json": {"chat_template": _TEMPLATES}, "config.json": {}},
    "chat template file": {"tokenizer_config.json": _NAMES, "chat_template.jinja": "file", "config.json": {}},
    "chat template files": {
        "tokenizer_config.json": _NAMES,
        "chat_template.jinja": "file",
        "additional_chat_templates/rag.jinja": "more",
        "config.json": {},
    },
    "chat template in JSON": {
        "tokenizer_config.json": _NAMES,
        "chat_template.json": {"chat_template": "json"},
        "config.json": {},
    },
}


def write_case(folder: Path, case: str) -> Path:
    for name, content in CASES[case].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def _answer(case: str) -> dict[str, Any]:
    import gguf

    writer = gguf.GGUFWriter(None, "llama")
    with tempfile.TemporaryDirectory() as folder:
        gguf.SpecialVocab(write_case(Path(folder), case), n_vocab=N_VOCAB).add_to_gguf(writer, quiet=True)
    keys = {key: entry.value for key, entry in writer.kv_data[0].items()}
    keys.pop("general.architecture")
    return keys


if __name__ == "__main__":
    ANSWERS.write_text(json.dumps({case: _answer(case) for case in CASES}, indent=1) + "\n")
