"""A checkpoint's `config.json` as transformers reads it: nested text part, defaults, and one form of rope settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from pyinfer.errors import ConvertError


@dataclass(frozen=True)
class RopeSettings:
    """Rotary embedding of the layers that see everything; `local_base` is that of the layers that see a window."""

    kind: str  # 'default', 'linear', 'yarn', 'longrope', 'llama3', 'dynamic'
    parameters: Mapping[str, Any]  # 'rope_theta' and what the kind needs
    local_base: float | None = None

    @property
    def base(self) -> float:
        return self.number("rope_theta", 10000.0)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.parameters.get(key)
        value = default if value is None else value
        if not _is_number(value):
            raise ConvertError(f"config.json: rope setting {key!r} is {value!r}; {self.kind!r} needs a number there")
        return float(value)


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number that a float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


class HFConfig:
    """Typed access to the values of a config; those of `text_config` count where there is one."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        nested = raw.get("text_config")
        self.raw = {**defaults, **raw, **(nested if isinstance(nested, dict) else {})}
        if self.raw.get("num_key_value_heads") is None:
            self.raw["num_key_value_heads"] = self.raw.get("num_attention_heads")

    def get(self, key: str) -> Any:
        return self.raw.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ConvertError(f"config.json: {key!r} is {value!r}; expected a positive integer")
        return value

    def number(self, key: str) -> float:
        value = self.raw.get(key)
        if not _is_number(value):
            raise ConvertError(f"config.json: {key!r} is {value!r}; expected a number")
        return float(value)

    @property
    def n_heads(self) -> int:
        return self.integer("num_attention_heads")

    @property
    def n_kv_heads(self) -> int:
        return self.integer("num_key_value_heads")

    @property
    def head_dim(self) -> int:
        return self.integer("head_dim", self.integer("hidden_size") // self.n_heads)

    def rope(self) -> RopeSettings:
        """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` before it."""
        given = self.raw.get("rope_parameters")
        given = given if isinstance(given, dict) else {}
        full, local = given.get("full_attention"), given.get("sliding_attention")
        scaling = self.raw.get("rope_scaling")
        parameters = {
            **(scaling if isinstance(scaling, dict) else {}),
            **(full if isinstance(full, dict) else {} if isinstance(local, dict) else given),
        }
        for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
            if parameters.get(key) is None and self.raw.get(key) is not None:
                parameters[key] = self.raw[key]
        kind = str(parameters.get("rope_type") or parameters.get("type") or "default").lower()
        local_base = local.get("rope_theta") if isinstance(local, dict) else None
        local_base = self.raw.get("rope_local_base_freq") if local_base is None else local_base
        if local_base is not None and not _is_number(local_base):
            raise ConvertError(f"config.json: the rope base of local layers is {local_base!r}; expected a number")
        return RopeSettings(kind, parameters, None if local_base is None else float(local_base))
