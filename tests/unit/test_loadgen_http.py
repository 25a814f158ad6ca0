"""Reading HTTP responses and event streams, cut at any byte."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfer.errors import ConfigError
from pyinfer.loadgen.http_client import HttpClient
from pyinfer.loadgen.http_reader import MAX_HEAD, EventReader, HttpError, ResponseReader

pytestmark = pytest.mark.unit

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\ntransfer-encoding:  Chunked\r\n\r\n"
    b'E\r\ndata: {"a":1}\n\r\n1;ext=1\r\n\n\r\n1a\r\ndata: x\r\ndata: y\n\n: hello\n\r\n0\r\nTrailer: 1\r\n\r\n'
)
PLAIN = b'HTTP/1.1 404 Not Found\r\nContent-Length: 12\r\nContent-Type: application/json\r\n\r\n{"error": 1}'


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.lists(st.integers(0, 10_000), max_size=40))
@settings(derandomize=True, max_examples=200)
def test_chunked_stream_cut_anywhere(cuts: list[int]) -> None:
    reader, events = ResponseReader(), EventReader()
    found = [event for piece in pieces(CHUNKED, cuts) for event in events.feed(reader.feed(piece))]
    assert found == [b'{"a":1}', b"x\ny"]
    assert reader.is_complete and reader.status == 200 and reader.headers["content-type"] == "text/event-stream"
    reader.feed_eof()


@given(st.lists(st.integers(0, 10_000), max_size=20))
@settings(derandomize=True, max_examples=100)
def test_plain_reply_cut_anywhere(cuts: list[int]) -> None:
    reader = ResponseReader()
    body = b"".join([reader.feed(piece) for piece in pieces(PLAIN, cuts)])
    assert body == b'{"error": 1}' and reader.status == 404 and reader.is_complete


def test_every_single_byte() -> None:
    reader, events = ResponseReader(), EventReader()
    found = [event for i in range(len(CHUNKED)) for event in events.feed(reader.feed(CHUNKED[i : i + 1]))]
    assert found == [b'{"a":1}', b"x\ny"] and reader.is_complete


def test_bodies_of_other_kinds() -> None:
    until_end = ResponseReader()
    assert until_end.feed(b"HTTP/1.0 200 OK\r\n\r\nabc") == b"abc" and not until_end.is_complete
    assert until_end.feed(b"def") == b"def"
    until_end.feed_eof()
    assert until_end.is_complete
    empty = ResponseReader()
    assert empty.feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n") == b"" and empty.is_complete
    assert empty.status == 204


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + bytes([65]) * MAX_HEAD,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * (MAX_HEAD + 1),
    ],
)
def test_what_is_not_http(data: bytes) -> None:
    with pytest.raises(HttpError):
        ResponseReader().feed(data)


@pytest.mark.parametrize("end", [20, len(CHUNKED) - 3, len(CHUNKED) - 30])
def test_cut_off(end: int) -> None:
    reader = ResponseReader()
    reader.feed(CHUNKED[:end])
    with pytest.raises(HttpError):
        reader.feed_eof()


def test_base_urls() -> None:
    assert HttpClient("http://127.0.0.1:8000/v1/").base_url == "http://127.0.0.1:8000"
    assert HttpClient("localhost:1234").base_url == "http://localhost:1234"
    assert HttpClient("https://host/api/v1").base_url == "https://host/api"
    for url in ("ftp://host", "http://", "http://host:port", "http://host:99999", "http://u:p@host", ""):
        with pytest.raises(ConfigError):
            HttpClient(url)
    with pytest.raises(ConfigError):
        HttpClient("http://host", "a\r\nb")
