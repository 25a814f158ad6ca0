"""Reading an HTTP/1.1 response (RFC 9112) and its server-sent events (WHATWG HTML, 9.2), without any I/O.

Bytes go in as they arrive, cut anywhere; what they complete comes out at once.
"""

from __future__ import annotations

MAX_HEAD = 64 << 10  # bytes of status line and headers, or of one chunk-size line


class HttpError(Exception):
    """The peer does not speak HTTP/1.1 as it should."""


class ResponseReader:
    """Takes one response apart: `status`, `headers` (names in lower case), and the body as it comes."""

    def __init__(self) -> None:
        self.status = 0  # 0 until the head is read
        self.headers: dict[str, str] = {}
        self.is_complete = False
        self._buffer = bytearray()
        self._is_chunked = False
        self._left: int | None = None  # bytes of the body, or of the chunk, still to come; None: until the end
        self._chunk_began = False  # its data is not followed by CRLF yet
        self._in_trailer = False

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body that are new."""
        self._buffer += data
        if not self.status and not self._read_head():
            return b""
        return self._read_chunks() if self._is_chunked else self._read_plain()

    def feed_eof(self) -> None:
        """The peer closed the connection; `HttpError` if that cut the response."""
        if self.status and not self._is_chunked and self._left is None:
            self.is_complete = True
        if not self.is_complete:
            raise HttpError("the server closed the connection before the response was complete")

    def _read_head(self) -> bool:
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD:
                    raise HttpError("the response's headers do not end")
                return False
            lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
            del self._buffer[: end + 4]
            words = lines[0].split(" ", 2)
            if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
                raise HttpError(f"the response does not start like HTTP/1.1: {lines[0][:80]!r}")
            if words[1][0] != "1":  # 1xx announces the response proper
                break
        pairs = (line.partition(":") for line in lines[1:])
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self.status = int(words[1])
        self._is_chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if self._is_chunked or self.status in (204, 304):
            self._left = 0
        elif "content-length" in self.headers:
            length = self.headers["content-length"]
            if not length.isdecimal():
                raise HttpError(f"Content-Length is {length[:80]!r}")
            self._left = int(length)
        return True

    def _read_plain(self) -> bytes:
        if self._left is None:
            body = bytes(self._buffer)
        else:
            body = bytes(self._buffer[: self._left])
            self._left -= len(body)
            self.is_complete = self._left == 0
        self._buffer.clear()
        return body

    def _read_chunks(self) -> bytes:
        buffer, body = self._buffer, bytearray()
        while not self.is_complete:
            if self._left:
                part = buffer[: self._left]
                if not part:
                    break
                del buffer[: len(part)]
                body += part
                self._left -= len(part)
                continue
            end = buffer.find(b"\r\n")
            if end < 0:
                if len(buffer) > MAX_HEAD:
                    raise HttpError("a chunk's size line does not end")
                break
            line = bytes(buffer[:end])
            del buffer[: end + 2]
            if self._in_trailer:
                self.is_complete = not line
            elif self._chunk_began:
                if line:
                    raise HttpError("a chunk is longer than it says")
                self._chunk_began = False
            else:
                self._begin_chunk(line)
        return bytes(body)

    def _begin_chunk(self, line: bytes) -> None:
        try:
            self._left = int(line.split(b";")[0], 16)
        except ValueError:
            raise HttpError(f"a chunk's size is {line[:40]!r}") from None
        if self._left < 0:
            raise HttpError(f"a chunk's size is {line[:40]!r}")
        self._chunk_began = self._left > 0
        self._in_trailer = self._left == 0


class EventReader:
    """Takes an event stream apart; of each event only its data matters here."""

    def __init__(self) -> None:
        self._rest = b""  # of a line
        self._data: list[bytes] = []  # lines of the event that is not complete yet

    def feed(self, body: bytes) -> list[bytes]:
        """The data of the events that these bytes complete."""
        if not body:
            return []
        *lines, self._rest = (self._rest + body).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events
