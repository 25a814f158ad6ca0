"""Sizes as people write them, and text fit for a terminal."""

from __future__ import annotations

import pytest
import typer

from pyinfer.cli.common import checked
from pyinfer.cli.text import one_line, safe
from pyinfer.errors import ConfigError
from pyinfer.runtime.sizes import format_binary, format_size, parse_size

pytestmark = pytest.mark.unit


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("0", 0),
            ("1024", 1024),
            ("1k", 1024),
            ("512M", 512 << 20),
            ("4GiB", 4 << 30),
            ("1.5 gb", 3 << 29),
            ("2T", 2 << 40),
        ],
    )
    def test_parse(self, text: str, value: int) -> None:
        assert parse_size(text) == value

    @pytest.mark.parametrize("text", ["", "G", "-1", "1.2.3", "4 X", "1e9", "nan"])
    def test_nonsense(self, text: str) -> None:
        with pytest.raises(ConfigError):
            parse_size(text)

    def test_format(self) -> None:
        assert [format_size(n) for n in (0, 999, 1000, 98_362_432, 999_960_000, 3 * 10**12)] == [
            "0 B", "999 B", "1.0 kB", "98.4 MB", "1.0 GB", "3.0 TB",
        ]  # fmt: skip
        assert [format_binary(n) for n in (1023, 1024, 1 << 30, 3 << 39)] == ["1023 B", "1.0 KiB", "1.0 GiB", "1.5 TiB"]


class TestText:
    def test_control_characters_are_escaped(self) -> None:
        assert safe("a\x1b[31mb\x07\r\n\x9b\u202e\u200b\u2028\udcff") == (
            r"a\x1b[31mb\x07\r\n\x9b\u202e\u200b\u2028\udcff"
        )
        assert safe("wörld 🎉 日本") == "wörld 🎉 日本"
        assert one_line(" a\n b\x1b ") == r"a b\x1b"


def test_callbacks_refuse_as_usage() -> None:
    with pytest.raises(typer.BadParameter, match="not a size"):
        checked(parse_size)("x")
    assert checked(parse_size)("1k") == "1k" and checked(parse_size)(None) is None
