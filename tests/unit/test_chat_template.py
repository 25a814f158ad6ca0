"""Chat templates: llama.cpp's expected renderings, what transformers' environment offers, and hostile templates."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pyinfer.errors import TemplateError
from pyinfer.runtime.chat_template import ChatTemplate

pytestmark = pytest.mark.unit

DATA = Path(__file__).parent.parent / "data" / "chat_templates.json"
CASES: list[dict[str, Any]] = json.loads(DATA.read_text("utf-8"))["cases"]
# the conversation of llama.cpp's test-chat-template.cpp
CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "Who are you"},
    {"role": "assistant", "content": "   I am an assistant   "},
    {"role": "user", "content": "Another question"},
]
USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, Any]] | None = None, **kwargs: Any) -> str:
    return ChatTemplate({"default": source}, bos_token="<s>", eos_token="</s>").render(messages or USER, **kwargs)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_renders_what_llama_cpp_expects(case: dict[str, Any]) -> None:
    template = ChatTemplate({"default": case["template"]}, bos_token=case["bos_token"], eos_token=case["eos_token"])
    extra = [{"role": role, "content": content} for role, content in case["extra"]]
    assert template.render(CONVERSATION + extra) == case["expected"]


TEMPLATE_FOLDER = os.environ.get("PYINFER_CHAT_TEMPLATES")  # a checkout of llama.cpp's models/templates


@pytest.mark.skipif(not TEMPLATE_FOLDER, reason="PYINFER_CHAT_TEMPLATES names no folder of .jinja files")
@pytest.mark.parametrize("path", sorted(Path(TEMPLATE_FOLDER or ".").glob("*.jinja")), ids=lambda path: path.stem)
def test_renders_every_template_of_a_folder(path: Path) -> None:
    """`functions` and `datetime` are what the firefunction template asks its caller for."""
    messages = [*USER, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "And now?"}]
    text = render(path.read_text("utf-8"), messages, functions="", datetime="now")
    assert "And now?" in text


class Metadata(dict[str, Any]):
    """As much of a GGUFFile as templates read."""

    @property
    def metadata(self) -> dict[str, Any]:
        return self


GGUF = Metadata(
    {
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ bos_token }}plain{{ eos_token }}",
        "tokenizer.chat_template.tool_use": "tools: {{ tools | length }}",
        "tokenizer.chat_template.rag": "rag",
        "tokenizer.chat_templates": ["tool_use", "rag"],
    }
)


def test_takes_templates_and_tokens_from_metadata(tmp_path: Path) -> None:
    template = ChatTemplate.from_gguf(GGUF)  # type: ignore[arg-type]
    assert template.render(USER) == "<s>plain</s>"
    assert template.render(USER, tools=[{"type": "function"}]) == "tools: 1"
    assert ChatTemplate.from_gguf(GGUF, "rag").render(USER) == "rag"  # type: ignore[arg-type]
    with pytest.raises(TemplateError, match=r"no chat template 'x'; it has: default, rag, tool_use"):
        ChatTemplate.from_gguf(GGUF, "x")  # type: ignore[arg-type]
    file = tmp_path / "own.jinja"
    file.write_text("own {{ eos_token }}")
    assert ChatTemplate.from_gguf(GGUF, override=file).render(USER) == "own </s>"  # type: ignore[arg-type]
    with pytest.raises(TemplateError, match=r"cannot read the chat template .*absent"):
        ChatTemplate.from_gguf(GGUF, override=tmp_path / "absent")  # type: ignore[arg-type]


def test_without_a_template_the_error_names_the_option() -> None:
    template = ChatTemplate.from_gguf(Metadata({}))  # type: ignore[arg-type]
    assert not template
    with pytest.raises(TemplateError, match="--chat-template"):
        template.render(USER)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n", "x\n"),  # trim_blocks and lstrip_blocks
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
            "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "013",
        ),
        ('{{ {"a": "<é>\'&"} | tojson }}', '{"a": "<é>\'&"}'),
        ('{{ [1, {"a": 2}] | tojson(indent=2) }}', '[\n  1,\n  {\n    "a": 2\n  }\n]'),
        ('{{ [1, 2] | tojson(separators=(",", ":")) }}', "[1,2]"),
        ('{{ [1, 2] | map("string") | tojson }}', '["1", "2"]'),
        ("{% set x = 1 %}{% generation %}{{ x }}{% set x = 2 %}{% endgeneration %}{{ x }}", "11"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}", "1/1True"),
        ("{% for k, v in {'a': 1, 'b': 2}.items() if v > 1 %}{{ k ~ v }}{% else %}none{% endfor %}", "b2"),
        ("{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        ("{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m(1) %}!{% endcall %}", "12!"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}", "2"),
        ("{{ '%s-%02d' % ('a', 7) }} {{ '{}-{:>3}'.format('b', 1) }} {{ '%s' | format('c') }}", "a-07 b-  1 c"),
        (
            "{{ 'a,b'.split(',') | join('+') }} {{ ', '.join(['x', 'y']) }} {{ 'aba' | replace('a', 'c') }}",
            "a+b x, y cbc",
        ),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{{ custom }} {{ add_generation_prompt }} {{ tools is none }} {{ missing is defined }}", "7 True True False"),
    ],
)
def test_environment_is_that_of_transformers(source: str, expected: str) -> None:
    assert render(source, custom=7) == expected


def test_content_parts_and_tool_calls_are_normalized() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "ab"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    source = "{{ messages[0].content is none }}{{ messages[0].tool_calls[0].function.arguments.x }}"
    assert render(source, messages) == "True1"
    with pytest.raises(TemplateError, match=r"messages\[0\].content\[0\] has type 'image_url'"):
        render("x", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    call["function"]["arguments"] = "{"  # type: ignore[index]
    with pytest.raises(TemplateError, match=r"tool_calls\[0\].function.arguments is not JSON"):
        render("x", messages)


def grown(start: str, step: str) -> str:
    """A namespace value that becomes `step` sixty times over, then is printed."""
    body = "{% for i in range(60) %}{% set ns.x = " + step + " %}{% endfor %}"
    return "{% set ns = namespace(x=" + start + ") %}" + body + "{{ ns.x }}"


HOSTILE = {
    "loops that write nothing": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "output": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "output in a macro": "{% macro m() %}{% for a in range(99999) %}{% for b in range(99999) %}"
    + "x" * 999
    + "{% endfor %}{% endfor %}{% endmacro %}{{ m() }}",
    "range": "{{ range(10 ** 12) | list }}",
    "repeat": "{{ 'a' * 10 ** 10 }}",
    "repeat a list": "{{ [0] * 10 ** 10 }}",
    "power": "{{ 9 ** 999999999 }}",
    "product": grown("3", "ns.x * ns.x"),
    "doubling": grown("'ab'", "ns.x + ns.x"),
    "doubling with ~": grown("'ab'", "ns.x ~ ns.x"),
    "doubling by set": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% endfor %}",
    "nested lists": grown("[1]", "[ns.x, ns.x]"),
    "nested dicts": grown("{}", "dict(a=ns.x, b=ns.x)"),
    "nested namespaces": grown("1", "namespace(x=ns, y=ns)"),
    "recursive macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "format width": "{{ '%1000000000d' % 1 }}",
    "format star": "{{ '%*d' | format(1000000000, 1) }}",
    "str.format width": "{{ '{:1000000000}'.format(1) }}",
    "str.format computed": "{{ '{:{}}'.format('x', '1000000000') }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "replace": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "replace filter": "{% set a = 'a' * 1000000 %}{{ a | replace('a', a) }}",
    "join": "{% set a = 'a' * 1000000 %}{{ a.join(range(99999) | map('string') | list) }}",
    "join filter": "{% set a = 'a' * 1000000 %}{{ range(99999) | join(a) }}",
    "tojson indent": "{{ [1, 2] | tojson(indent=1000000000) }}",
    "indent": "{{ ('\n' * 1000000) | indent('x' * 1000000) }}",
    "round": "{{ 3 | round(1000000000, 'ceil') }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "python": "{{ ''.__class__.__mro__ }}",
    "mutation": "{{ messages.append(1) }}",
    "deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "syntax": "{% for x in %}",
    "import": "{% import 'os' as os %}",
    "refusal": "{{ raise_exception('no\nway') }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_template_is_stopped_with_one_line(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyinfer.runtime.template_budget.MAX_SECONDS", 1.0)
    before = threading.active_count()
    with pytest.raises(TemplateError) as caught:
        print(len(render(source)))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    assert threading.active_count() == before


def test_a_long_conversation_is_within_the_budget() -> None:
    messages = [{"role": role, "content": "word " * 400} for _ in range(500) for role in ("user", "assistant")]
    source = (
        "{% for m in messages %}{% if loop.index0 == messages | length - 1 %}!{% endif %}"
        "{{ '<' ~ m['role'] ~ '>' + m['content'] | trim }}{% endfor %}"
    )
    assert len(render(source, messages)) > 1_900_000
