"""The sockets between a client's process and its engine's: messages as msgpack over ZeroMQ.

Two one-way sockets, since a ZeroMQ socket belongs to one thread at a time. They are Unix sockets in a folder that only
this user may enter. Where those do not exist, or the folder's path is too long for one, they are TCP on the loopback,
encrypted (CURVE) with a server key that only the two processes know, so that no other user can speak to the engine.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from pyinfer.runtime.engine_messages import FromEngine, ToEngine

_MAX_UNIX_PATH = 100  # bytes; the kernel's limit is 107


class Address(msgspec.Struct, frozen=True):
    """Where a client listens; handed to the engine's process when it starts."""

    requests: str
    reports: str
    server_key: str = ""  # Z85; empty: Unix sockets


class Sender:
    """One thread at a time."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: ToEngine | FromEngine, *, wait: float = 0.0) -> bool:
        """False if nobody is connected within `wait` seconds; once somebody is, it never waits."""
        self._socket.sndtimeo = int(1000 * wait)
        try:
            self._socket.send(self._encoder.encode(message))
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self._socket.close()


@dataclass
class ClientWire:
    """The client's ends, bound to an address of their own."""

    address: Address
    requests: Sender
    reports: zmq.Socket[bytes]
    _folder: Path | None
    _decoder: msgspec.msgpack.Decoder[FromEngine]

    @classmethod
    def open(cls, context: zmq.Context[zmq.Socket[bytes]], folder: Path | None) -> ClientWire:
        """`folder` is one of `private_folder`; None: TCP."""
        public, secret = ("", "") if folder is not None else (key.decode() for key in zmq.curve_keypair())
        requests, reports = _socket(context, zmq.PUSH), _socket(context, zmq.PULL)
        names = []
        for name, socket in (("requests", requests), ("reports", reports)):
            if folder is not None:
                socket.bind(endpoint := f"ipc://{folder / name}")
            else:
                socket.curve_server = True
                socket.curve_secretkey = secret.encode()
                socket.curve_publickey = public.encode()
                endpoint = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
            names.append(endpoint)
        decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        return cls(Address(names[0], names[1], public), Sender(requests), reports, folder, decoder)

    def receive(self) -> FromEngine | None:
        """The next message that is there already."""
        try:
            return self._decoder.decode(self.reports.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def unlink(self) -> None:
        """Take the folder away; both ends are connected and need it no more."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def close(self) -> None:
        self.requests.close()
        self.reports.close()
        self.unlink()


class EngineWire:
    """The engine's ends."""

    def __init__(self, address: Address) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._requests = _socket(context, zmq.PULL)
        reports = _socket(context, zmq.PUSH)
        reports.linger = 2000  # milliseconds: the last words of an engine that ends by itself
        for socket, endpoint in ((self._requests, address.requests), (reports, address.reports)):
            if address.server_key:
                public, secret = zmq.curve_keypair()
                socket.curve_publickey, socket.curve_secretkey = public, secret
                socket.curve_serverkey = address.server_key.encode()
            socket.reconnect_ivl = 10  # milliseconds
            socket.connect(endpoint)
        self.reports = Sender(reports)
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

    def wait(self) -> ToEngine:
        """The next message."""
        return self._decoder.decode(self._requests.recv())

    def receive(self) -> ToEngine | None:
        """The next message that is there already."""
        try:
            return self._decoder.decode(self._requests.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None


def private_folder() -> Path | None:
    """A new folder that only this user may enter, for Unix sockets; None where there are none."""
    if os.name == "nt":
        return None
    folder = Path(tempfile.mkdtemp(prefix="pyinfer-"))  # mode 0700
    if len(os.fsencode(folder / "requests")) <= _MAX_UNIX_PATH:
        return folder
    folder.rmdir()
    return None


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = 0  # what is under way is bounded by what the scheduler takes
    return socket
