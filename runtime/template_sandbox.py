"""The Jinja environment of chat templates: set up as transformers does, and bounded (see `template_budget`).

jinja2's `ImmutableSandboxedEnvironment` keeps a template away from Python. On top of it every loop item, call, filter,
operator, literal and output is charged. All of it runs in the caller's thread; nothing stays behind when it is stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_environment
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from pyinfer.errors import TemplateError
from pyinfer.runtime.template_budget import MAX_INT_BITS, MAX_VALUE, current, printable

# methods of str and int whose result is as large as a small argument says; no chat template needs them
_GROWING_METHODS = frozenset({"center", "expandtabs", "ljust", "maketrans", "rjust", "to_bytes", "translate", "zfill"})
# filters that are slow or grow without bound, and that chat templates do not use
_REMOVED_FILTERS = ("center", "pprint", "urlize", "wordwrap", "xmlattr")
_SMALL_INT_FILTERS = frozenset({"batch", "indent", "round", "slice", "tojson"})


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and renders one model's template; use only inside `template_budget.budgeted()`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlock, LoopControlExtension],
            finalize=_finalize,
        )
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.filters.update(join=_join, replace=_replace, sum=_sum, tojson=to_json)
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.filters.update({"bounded_items": _items, "bounded_concat": _concat, "bounded_literal": _literal})
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        bounded: nodes.Template = _Bounder().visit(tree)
        return bounded.set_environment(self)  # type: ignore[return-value]  # returns the node itself

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in _GROWING_METHODS and isinstance(obj, (str, bytes, int)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatter = super().wrap_str_format(value)
        if formatter is None:
            return None

        @wraps(formatter)
        def priced(*args: Any, **kwargs: Any) -> str:
            current().price_format(value.__self__, (args, kwargs))
            return formatter(*args, **kwargs)

        return priced

    # the double underscores keep keyword arguments of the template from colliding with ours
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        spent = current()
        spent.charge(1)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            if __obj.__name__ == "join" and len(args) == 1:
                args = (list(args[0]),)
                spent.price_join(str(owner), args[0])
            elif __obj.__name__ == "replace" and len(args) >= 2:
                spent.price_replace(str(owner), str(args[0]), str(args[1]))
        return spent.weigh(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        spent = current()
        if operator == "%" and isinstance(left, str):
            spent.price_format(left, right)
        elif operator == "+":
            spent.price(spent.size(left) + spent.size(right))
        elif operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                _check_int(left.bit_length() + right.bit_length())
            else:
                counts = [max(0, side) for side in (left, right) if isinstance(side, int)]
                spent.price(max(spent.size(left), spent.size(right)) * (counts or [1])[0])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_int(left.bit_length() * max(0, right))
        return spent.weigh(super().call_binop(context, operator, left, right))


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant says, for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Bounder(NodeTransformer):
    """Routes loops, `~` and literals through the bounded filters."""

    def _through(self, name: str, node: nodes.Node, *arguments: int) -> nodes.Filter:
        constants: list[nodes.Expr] = [nodes.Const(value) for value in arguments]
        return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        text = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = self._through("bounded_items", node.iter, text)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._through("bounded_concat", nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._through("bounded_literal", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._through("bounded_literal", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._through("bounded_literal", node) if node.ctx == "load" else node


def _items(value: Any, text: int) -> Iterator[Any]:
    """The items of a loop's iterable; each is charged with the literal text of the loop's body.

    None has no items: several `tool_use` templates loop over `tools` without asking whether there are any.
    """
    spent = current()
    for item in () if value is None else value:
        spent.charge(text)
        yield item


def _concat(parts: tuple[Any, ...]) -> str:
    current().weigh(parts)
    return "".join(map(str, parts))


def _literal(value: Any) -> Any:
    return current().weigh(value)


def _finalize(value: Any) -> Any:
    spent = current()
    size = spent.size(printable(value))
    spent.price(size)
    spent.charge_output(size)
    return value


def _check_int(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise TemplateError("the chat template was stopped: it computes an integer of thousands of digits")


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with its operands checked and its result charged."""

    @wraps(function)  # keeps jinja's marks, such as that of pass_environment
    def guarded(*args: Any, **kwargs: Any) -> Any:
        spent = current()
        for value in (*args, *kwargs.values()):
            printable(value)
        if name in _SMALL_INT_FILTERS:
            numbers = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, int)]
            if any(abs(number) > 100 for number in numbers):
                raise TemplateError(f"the chat template calls {name} with {max(numbers)}; at most 100 is allowed")
        if name == "format":
            spent.price_format(str(args[0]), (args[1:], kwargs))
        elif name == "indent":
            widths = [len(v) for v in (*args[1:], *kwargs.values()) if isinstance(v, str)]
            spent.price(len(str(args[0])) + len(str(args[0]).splitlines()) * max([100, *widths]))
        return spent.weigh(function(*args, **kwargs))

    return guarded


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own `tojson`, as chat templates expect it."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_iterator_items
    )
    if indent is None and separators is None:
        return encoder.encode(value)
    parts, total = [], 0
    for part in encoder.iterencode(value):
        total += len(part)
        if total > MAX_VALUE:
            current().price(total)
        parts.append(part)
    return "".join(parts)


def _iterator_items(value: Any) -> list[Any]:
    """What `map` and `select` give, as JSON can hold it."""
    if isinstance(value, Iterator):
        return list(current().weigh(list(value)))
    raise TypeError(f"a value of type {type(value).__name__} cannot be written as JSON")


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    current().price_replace(str(value), str(old), str(new))
    return str(value).replace(str(old), str(new), -1 if count is None else count)


@pass_environment
def _join(env: BoundedEnvironment, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    parts = list(value if attribute is None else env.call_filter("map", value, kwargs={"attribute": attribute}))
    current().price_join(str(d), parts)
    return str(d).join(map(str, parts))


@pass_environment
def _sum(env: BoundedEnvironment, value: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    parts = list(value if attribute is None else env.call_filter("map", value, kwargs={"attribute": attribute}))
    if not all(isinstance(part, (int, float)) for part in (start, *parts)):
        raise TemplateError("the chat template sums values that are not numbers")
    return sum(parts, start)


def _raise_exception(message: Any) -> None:
    reason = " ".join(str(message).split())[:500]
    raise TemplateError(f"the chat template refuses the conversation: {reason}")


def _strftime_now(format: str) -> str:
    if len(format) > 256:
        raise TemplateError("the chat template asks for a date format of more than 256 characters")
    return datetime.now().strftime(format)
