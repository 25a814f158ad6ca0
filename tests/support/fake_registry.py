"""An npm registry on a loopback socket: package documents and tarballs that the real npm takes."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class FakeRegistry:
    """Packages by name; `requests` lists the paths that were asked for."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.requests: list[str] = []
        self._documents: dict[str, dict[str, object]] = {}
        self._tarballs: dict[str, bytes] = {}

    def add(self, package: str, version: str, members: Mapping[str, bytes], licence: str = "MIT") -> None:
        """Publishes a version; the newest is the one added last."""
        manifest = {"name": package, "version": version, "license": licence}
        data = _tarball({"package.json": json.dumps(manifest).encode(), **members})
        path = f"/{package}/-/{package.rpartition('/')[2]}-{version}.tgz"
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
        dist = {"tarball": self.address + path, "integrity": integrity, "shasum": hashlib.sha1(data).hexdigest()}
        document = self._documents.setdefault(package, {"name": package, "versions": {}})
        versions = document["versions"]
        assert isinstance(versions, dict)
        versions[version] = {**manifest, "dist": dist}
        document["dist-tags"] = {"latest": version}
        self._tarballs[path] = data

    def answer(self, path: str) -> bytes | None:
        """The body of a GET, or None for 404."""
        path = urllib.parse.unquote(path)
        self.requests.append(path)
        if path in self._tarballs:
            return self._tarballs[path]
        document = self._documents.get(path.removeprefix("/"))
        return None if document is None else json.dumps(document).encode()


@contextmanager
def fake_registry() -> Iterator[FakeRegistry]:
    """A registry that serves until the block ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = registry.answer(self.path)
            self.send_response(200 if body is not None else 404)
            body = body if body is not None else b'{"error": "not found"}'
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    registry = FakeRegistry(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _tarball(members: Mapping[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))
    return gzip.compress(raw.getvalue(), mtime=0)
