"""A conversation -> prompt ids, so that what a user writes can never become a control token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyinfer.runtime.chat_template import ChatTemplate, Message, normalized

if TYPE_CHECKING:
    from pyinfer.runtime.tokenizer import Tokenizer

_UNTRUSTED_ROLES = ("user", "tool")
_CUT = "\ufdd0"  # a Unicode noncharacter: reserved for use inside a program, never part of a text


def chat_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **kwargs: Any,
) -> list[int]:
    """The ids of the rendered conversation, with the model's BOS if the template did not write it.

    Control tokens are read in what the template writes, and in system and assistant messages. Where a user's or tool's
    text spells one, it is cut in two after its first character, and both parts are plain text.
    """
    conversation = [normalized(message, index) for index, message in enumerate(messages)]
    for message in conversation:
        content = message.get("content")
        if message.get("role") in _UNTRUSTED_ROLES and isinstance(content, str):
            message["content"] = cut_control_tokens(tokenizer, content)
    text = template.render(
        conversation, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt, **kwargs
    )
    ids: list[int] = []
    for part in text.split(_CUT):
        ids += tokenizer.encode(part, add_special=False, parse_special=True)
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids


def cut_control_tokens(tokenizer: Tokenizer, text: str) -> str:
    """`text` with a cut mark inside each control token that it spells."""
    text = text.replace(_CUT, "\ufffd")
    while True:
        pieces = [_cut_once(tokenizer, piece) for piece in text.split(_CUT)]
        cut = _CUT.join(pieces)
        if cut == text:
            return text
        text = cut  # the parts of one token may spell another with what stands beside them


def _cut_once(tokenizer: Tokenizer, text: str) -> str:
    parts: list[str] = []
    for part in tokenizer.split_special(text):
        spelled = part if isinstance(part, str) else tokenizer.token_text(part)
        if isinstance(part, int) and part in tokenizer.special_ids and len(spelled) > 1:
            spelled = spelled[0] + _CUT + spelled[1:]
        parts.append(spelled)
    return "".join(parts)
