"""`ChatTemplate`: a conversation becomes the prompt that the model was trained on, by the GGUF's own Jinja template.

A GGUF carries its template in `tokenizer.chat_template`, and may carry more under `tokenizer.chat_template.NAME`. The
environment and the variables are those of Hugging Face transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyinfer.errors import PyinferError, TemplateError

if TYPE_CHECKING:
    from jinja2 import Template

    from pyinfer.quant.gguf import GGUFFile

MAX_SOURCE = 1 << 20
Message = Mapping[str, Any]


class ChatTemplate:
    """The templates of one model: `default`, and named ones such as `tool_use` or `rag`.

    Compiled on first use, so that a broken template does not keep a model from completing text. May be used from
    several threads.
    """

    def __init__(self, sources: Mapping[str, str], *, bos_token: str = "", eos_token: str = "") -> None:
        self.sources = dict(sources)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._compiled: dict[str, Template] = {}
        self._takes_system: dict[str, bool] = {}

    @classmethod
    def from_gguf(cls, file: GGUFFile, name: str | None = None, *, override: Path | None = None) -> ChatTemplate:
        """The templates of a GGUF. `name` makes that one the default; `override` is a file that replaces them all.

        A GGUF without a template gives a `ChatTemplate` that has none; only rendering with it is an error.
        """
        tokens: list[str] = file.get("tokenizer.ggml.tokens", [])

        def token(key: str) -> str:
            index = file.get(key, -1)
            return str(tokens[index]) if isinstance(index, int) and 0 <= index < len(tokens) else ""

        bos, eos = token("tokenizer.ggml.bos_token_id"), token("tokenizer.ggml.eos_token_id")
        if override is not None:
            return cls({"default": read_template(override)}, bos_token=bos, eos_token=eos)
        prefix = "tokenizer.chat_template"
        sources = {
            "default" if key == prefix else key[len(prefix) + 1 :]: value
            for key, value in file.metadata.items()
            if (key == prefix or key.startswith(prefix + ".")) and isinstance(value, str)
        }
        if name is not None:
            if name not in sources:
                known = ", ".join(sorted(sources)) or "none"
                raise TemplateError(f"the model has no chat template {name!r}; it has: {known}", param="chat_template")
            sources["default"] = sources[name]
        return cls(sources, bos_token=bos, eos_token=eos)

    def __bool__(self) -> bool:
        return "default" in self.sources

    def require(self) -> None:
        """`TemplateError` if the model has no template."""
        if not self:
            raise TemplateError(
                "this model has no chat template; give one with --chat-template FILE, or use /v1/completions",
                param="messages",
            )

    @property
    def knows_developer(self) -> bool:
        """Whether the template speaks of OpenAI's role `developer`; to others it is `system`."""
        return "developer" in self.sources.get("default", "")

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages`. With tools a template named `tool_use` is taken if there is one.

        A template that refuses or leaves out system messages gets the system's text in front of the first user message.
        Raises `TemplateError` when there is no template, when it is broken, refuses the conversation or passes a limit.
        """
        variables = dict(kwargs)
        variables.update(
            tools=[dict(tool) for tool in tools] if tools else None,
            documents=[dict(document) for document in documents] if documents else None,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
        )
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        conversation = [normalized(message, index) for index, message in enumerate(messages)]
        if conversation and conversation[0].get("role") == "system" and not self._has_system_role(name):
            conversation = with_system_in_user(conversation)
        return self._run(name, {**variables, "messages": conversation})

    def _has_system_role(self, name: str) -> bool:
        if name not in self._takes_system:
            variables = {"bos_token": self.bos_token, "eos_token": self.eos_token, "tools": None, "documents": None}
            user = {"role": "user", "content": "question"}
            system = {"role": "system", "content": "an-instruction"}
            try:
                takes = "an-instruction" in self._run(name, {**variables, "messages": [system, user]})
            except TemplateError:
                takes = False
            self._takes_system[name] = takes
        return self._takes_system[name]

    def _run(self, name: str, variables: Mapping[str, Any]) -> str:
        from pyinfer.runtime.template_budget import budgeted

        with budgeted() as spent:
            try:
                parts = []
                for part in self._template(name).generate(variables):
                    spent.charge(len(part))
                    parts.append(part)
                return "".join(parts)
            except Exception as error:
                raise _explained(error) from error

    def _template(self, name: str) -> Template:
        compiled = self._compiled.get(name)
        if compiled is None:
            self.require()
            source = self.sources[name]
            if len(source) > MAX_SOURCE:
                raise TemplateError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are allowed")
            from pyinfer.runtime.template_sandbox import BoundedEnvironment

            compiled = self._compiled[name] = BoundedEnvironment().from_string(source)
        return compiled


def read_template(path: Path) -> str:
    """The text of a template file; raises `TemplateError` if it cannot be read."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise TemplateError(f"cannot read the chat template {path}: {reason}", param="chat_template") from error


def normalized(message: Message, index: int) -> dict[str, Any]:
    """An OpenAI message in the form that templates expect: text content joined, tool arguments as objects."""
    where = f"messages[{index}]"
    result = dict(message)
    content = result.get("content")
    if content is not None and not isinstance(content, str):
        result["content"] = "".join(_text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    calls = result.get("tool_calls")
    if calls:
        result["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return result


def with_system_in_user(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation without its leading system messages, their text joined to the first user message."""
    start = 0
    while start < len(messages) and messages[start].get("role") == "system":
        start += 1
    text = "\n".join(str(message.get("content") or "") for message in messages[:start])
    if start < len(messages) and messages[start].get("role") == "user":
        first = messages[start]
        return [{**first, "content": f"{text}\n{first.get('content') or ''}"}, *messages[start + 1 :]]
    return [{"role": "user", "content": text}, *messages[start:]]


def _text_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise TemplateError(f"{where} has type {kind!r}: this model takes text parts only", param=where)
    text = part.get("text")
    if not isinstance(text, str):
        raise TemplateError(f"{where}.text must be a string", param=where)
    return text


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except ValueError as error:
            raise TemplateError(f"{where}.function.arguments is not JSON: {error}", param=where) from error
    return {**call, "function": function}


def _explained(error: Exception) -> PyinferError:
    """Whatever a template raised, as one line."""
    if isinstance(error, PyinferError):
        return error
    from jinja2 import TemplateSyntaxError

    reason = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, TemplateSyntaxError):
        return TemplateError(f"the chat template is not valid Jinja: line {error.lineno}: {reason}")
    if isinstance(error, RecursionError):
        reason = "it nests too deeply"
    return TemplateError(f"the chat template failed on this conversation: {reason}")
