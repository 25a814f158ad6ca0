"""`Budget`: what one rendering of a chat template may spend in time, memory and output.

A template comes with a model file and may be hostile: it can loop, double a string, or nest a list in itself so that
printing it never ends. Everything it does is charged here; operations whose result can be much larger than their
operands are priced before they run.
"""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2.utils import Namespace

from pyinfer.errors import TemplateError

MAX_VALUE = 8 << 20  # characters and items in one value, nested values included
MAX_OUTPUT = 16 << 20  # characters of a rendered prompt
MAX_WORK = 256 << 20  # characters and items moved in one rendering
MAX_SECONDS = 5.0
MAX_INT_BITS = 1 << 14

_WIDE_OR_COMPUTED = re.compile(r"\d{4,}|[*]|\{[^{}]*\{")
_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)


class Budget:
    """Counters of one rendering; every method raises `TemplateError` once its limit is passed."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._work = 0
        self._output = 0
        self._ticks = 0
        # size of each container seen, by id; the container is kept so that the id stays its own
        self._sizes: dict[int, tuple[object, int]] = {}

    def charge(self, work: int) -> None:
        """Account for an operation that moves `work` characters or items."""
        self._work += work + 8
        if self._work > MAX_WORK:
            raise TemplateError(f"the chat template was stopped: it moves more than {MAX_WORK >> 20} Mi characters")
        self._ticks += 1
        if not self._ticks & 63 and time.monotonic() > self._deadline:
            raise TemplateError(f"the chat template was stopped: it runs for more than {MAX_SECONDS:.0f} s")

    def charge_output(self, size: int) -> None:
        """Account for `size` characters written to the prompt."""
        self._output += size
        if self._output > MAX_OUTPUT:
            raise TemplateError(f"the chat template was stopped: it writes more than {MAX_OUTPUT >> 20} Mi characters")

    def price(self, size: int) -> None:
        """Charge for a value of `size` before it is made."""
        if size > MAX_VALUE:
            raise TemplateError(
                f"the chat template was stopped: it builds a value of more than {MAX_VALUE >> 20} Mi characters"
            )
        self.charge(size)

    def size(self, value: Any) -> int:
        """Characters and items in `value`; a shared part counts each time it appears, as it would when printed."""
        if isinstance(value, (str, bytes)):
            return len(value) + 1
        if not isinstance(value, _CONTAINERS):
            return 1
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1]
        total = 1
        parts: Iterable[Any] = (part for pair in value.items() for part in pair) if isinstance(value, dict) else value
        for part in parts:
            total += self.size(printable(part))
            if total > MAX_VALUE:
                self.price(total)
        self._sizes[id(value)] = (value, total)
        return total

    def weigh(self, value: Any) -> Any:
        """`value` itself, charged."""
        self.price(self.size(value))
        return value

    def price_format(self, text: str, arguments: object) -> None:
        """Price `text % arguments` and `text.format(...)`: any field may print all of the arguments."""
        if _WIDE_OR_COMPUTED.search(text):
            raise TemplateError("the chat template formats with a width that is computed or over 999")
        fields = text.count("%") + text.count("{")
        self.price(len(text) + fields * (1000 + self.size(arguments)))

    def price_replace(self, text: str, old: str, new: str) -> None:
        self.price(len(text) + text.count(old) * len(new))

    def price_join(self, separator: str, parts: list[Any]) -> None:
        self.price(self.size(parts) + len(parts) * len(separator))


def printable(value: Any) -> Any:
    """`value` itself, unless it is a namespace: that could be made to hold itself, and then has no end as text."""
    if isinstance(value, Namespace):
        raise TemplateError("the chat template uses a namespace as a value")
    return value


_current: ContextVar[Budget] = ContextVar("template_budget")


def current() -> Budget:
    """The budget of the rendering that runs in this thread."""
    return _current.get()


@contextmanager
def budgeted() -> Iterator[Budget]:
    """A fresh budget for what this thread compiles and renders inside."""
    fresh = Budget()
    token = _current.set(fresh)
    try:
        yield fresh
    finally:
        _current.reset(token)
