"""Special tokens, BOS and EOS rules, and chat templates of a checkpoint as `tokenizer.*` metadata.

The rules are those of gguf-py's `SpecialVocab`: `tokenizer.json`'s post-processor tells what is put around a text,
`tokenizer_config.json` and `config.json` tell the ids.
"""

from __future__ import annotations

import re
from typing import Any

from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.errors import ConvertError

_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_KEY_NAMES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # "seperator" is the key's own spelling
_ADD_KINDS = ("bos", "eos", "sep")  # those that have a key `add_*_token`


def special_metadata(checkpoint: HFCheckpoint, n_vocab: int) -> dict[str, Any]:
    """Keys `tokenizer.ggml.*_token_id`, `add_*_token`, normalizer flags and `tokenizer.chat_template*`."""
    tokenizer = checkpoint.json("tokenizer.json")
    names = _token_names(checkpoint)
    adds = _added_around(tokenizer, names) if tokenizer else {}
    config = checkpoint.json("tokenizer_config.json")
    for kind in _ADD_KINDS:
        if isinstance(config.get(f"add_{kind}_token"), bool):
            adds.setdefault(kind, config[f"add_{kind}_token"])
    ids = _token_ids(checkpoint, names, n_vocab)
    metadata: dict[str, Any] = {f"tokenizer.ggml.{_KEY_NAMES.get(k, k)}_token_id": i for k, i in ids.items()}
    metadata |= {f"tokenizer.ggml.add_{kind}_token": value for kind, value in adds.items()}
    metadata |= chat_templates(checkpoint)
    return metadata | _normalizer_flags(tokenizer.get("normalizer"))


def chat_templates(checkpoint: HFCheckpoint) -> dict[str, Any]:
    """The template under `tokenizer.chat_template`, named ones under `tokenizer.chat_template.NAME`."""
    found: Any = checkpoint.json("tokenizer_config.json").get("chat_template")
    if found is None and checkpoint.has("chat_template.jinja"):
        extra = sorted((checkpoint.folder / "additional_chat_templates").glob("*.jinja"))
        texts = {"default": "chat_template.jinja", **{p.stem: f"additional_chat_templates/{p.name}" for p in extra}}
        found = [{"name": name, "template": checkpoint.text(path)} for name, path in texts.items()]
    if found is None:
        found = checkpoint.json("chat_template.json").get("chat_template")
    if isinstance(found, str):
        return {"tokenizer.chat_template": found}
    metadata: dict[str, Any] = {}
    for entry in found if isinstance(found, list) else []:
        name = re.sub(r"[^A-Za-z0-9]", "_", str(entry.get("name", "")))
        if name and isinstance(entry.get("template"), str):
            key = "tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"
            metadata[key] = entry["template"]
    named = [key.rpartition(".")[2] for key in metadata if key != "tokenizer.chat_template"]
    return {**({"tokenizer.chat_templates": named} if named else {}), **metadata}


def _token_names(checkpoint: HFCheckpoint) -> dict[str, str]:
    """The text of each kind of token that `tokenizer_config.json` names."""
    names = {}
    for kind in _KINDS:
        entry = checkpoint.json("tokenizer_config.json").get(f"{kind}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            names[kind] = text
    for kind, stand_in in (("bos", "cls"), ("eos", "sep")):
        if stand_in in names:
            names.setdefault(kind, names[stand_in])
    return names


def _token_ids(checkpoint: HFCheckpoint, names: dict[str, str], n_vocab: int) -> dict[str, int]:
    added = checkpoint.json("tokenizer.json").get("added_tokens") or []
    by_text = {entry["content"]: entry["id"] for entry in reversed(added)}
    config = checkpoint.config
    nested = config.get("text_config")
    ids: dict[str, int] = {}
    for kind in (*_KINDS, *(["eot"] if "eot" in names else [])):
        if kind == "cls":
            continue  # GGUF knows it as BOS
        value = by_text.get(names.get(kind, ""))
        if value is None:
            value = config.get(f"{kind}_token_id")
        if value is None and isinstance(nested, dict):
            value = nested.get(f"{kind}_token_id")
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if value < 0:
            raise ConvertError(f"config.json: '{kind}_token_id' is {value}; expected the id of a token")
        if value < n_vocab:
            ids[kind] = value
    return ids


def _added_around(tokenizer: dict[str, Any], names: dict[str, str]) -> dict[str, bool]:
    """Which of BOS, EOS and SEP the post-processor puts around or between texts; may correct `names`."""
    adds: dict[str, bool] = {}
    processor = tokenizer.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        kind = step.get("type")
        if kind == "ByteLevel":
            adds.setdefault("bos", False)
            adds.setdefault("eos", False)
        elif kind == "RobertaProcessing":
            adds.update(bos=True, eos=True, sep=True)
            for role in ("cls", "sep"):
                names.setdefault(role, str((step.get(role) or [names.get("bos")])[0]))
        elif kind == "TemplateProcessing":
            _read_template(step, names, adds)
    return adds


def _read_template(step: dict[str, Any], names: dict[str, str], adds: dict[str, bool]) -> None:
    single, pair = step.get("single") or [], step.get("pair") or []
    first = last = None
    if len(single) > 1:
        first, last = _special(single[0]), _special(single[-1])
    if first:
        if first not in (names.get("bos"), names.get("cls")):
            names.setdefault("bos", first)
            names.setdefault("cls", first)
        adds["bos"] = first in (names.get("bos"), names.get("cls"))
    if last:
        if names.get("eos") not in (None, last):
            names["eot"] = names["eos"]  # what ends a turn is not what ends a text
        names["eos"] = last
        adds["eos"] = True
    if not pair:
        return
    start = 1 if first and _special(pair[0]) == first else 0
    inner = pair[start : -1 if last and _special(pair[-1]) == last else None]
    sequences = [entry.get("Sequence", {}).get("id") for entry in (inner[:1] + inner[-1:])]
    between = [_special(entry) for entry in inner[1:-1]]
    if sequences != ["A", "B"] or not between:
        return
    separators = (names.get("sep"), names.get("eos"))
    adds["sep"] = (between[0] in separators and not last) or (len(between) == 2 and between[1] in separators)
    if adds["sep"] and "sep" not in names and "eos" in names:
        names["sep"] = names["eos"]


def _special(entry: dict[str, Any]) -> str | None:
    text = entry.get("SpecialToken", {}).get("id")
    return text if isinstance(text, str) else None


def _normalizer_flags(normalizer: Any) -> dict[str, bool]:
    if not isinstance(normalizer, dict):
        return {}
    kind = normalizer.get("type")
    flags: dict[str, bool] = {}
    if kind == "Lowercase":
        flags["tokenizer.ggml.normalizer.lowercase"] = True
    elif kind == "StripAccents":
        flags["tokenizer.ggml.normalizer.strip_accents"] = True
    elif kind == "BertNormalizer":
        for name in ("lowercase", "strip_accents"):
            if isinstance(normalizer.get(name), bool):
                flags[f"tokenizer.ggml.normalizer.{name}"] = normalizer[name]
    elif kind == "Sequence":
        for step in normalizer.get("normalizers") or []:
            flags |= _normalizer_flags(step)
    return flags
