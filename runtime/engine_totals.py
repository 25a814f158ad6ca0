"""`EngineTotals`: an engine's statistics over several lives; what only grows goes on growing."""

from __future__ import annotations

import msgspec

from pyinfer.runtime.outputs import EngineStats

_GAUGES = frozenset({"running", "waiting", "pages_total", "pages_used", "pages_cached", "kv_usage"})
_COUNTERS = tuple(name for name in EngineStats.__struct_fields__ if name not in _GAUGES)


class EngineTotals:
    """Not locked."""

    def __init__(self) -> None:
        self._last = _NOTHING
        self._before = dict.fromkeys(_COUNTERS, 0)  # of the lives that are over
        self._is_running = False

    def take(self, stats: EngineStats) -> int:
        """The newest of this life; returns how many tokens the model has read since the one before."""
        last, self._last, self._is_running = self._last, stats, True
        return stats.prompt_tokens - last.prompt_tokens + stats.generation_tokens - last.generation_tokens

    def restart(self) -> None:
        """A life is over."""
        for name in _COUNTERS:
            self._before[name] += getattr(self._last, name)
        changes = {name: 0 for name in EngineStats.__struct_fields__ if name != "pages_total"}
        self._last = msgspec.structs.replace(self._last, **changes)
        self._is_running = False

    def stats(self, n_requests: int) -> EngineStats:
        """`n_requests` are under way: without an engine they wait."""
        changes = {name: before + getattr(self._last, name) for name, before in self._before.items() if before}
        if not self._is_running:
            changes["waiting"] = n_requests
        return msgspec.structs.replace(self._last, **changes) if changes else self._last


_NOTHING = EngineStats(**dict.fromkeys(EngineStats.__struct_fields__, 0))
