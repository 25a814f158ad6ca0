"""The socket that a server listens on; opened before anything slow, so that a taken port is known at once."""

from __future__ import annotations

import socket

from pyinfer.errors import ConfigError


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `ConfigError` naming the address and the remedy."""
    where = f"{host}:{port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} is not an address of this machine: {error}", param="host") from error
    try:
        return socket.create_server(address[:2], family=family, backlog=2048)
    except PermissionError as error:
        raise ConfigError(f"no permission to listen on {where}; use a port over 1023", param="port") from error
    except OSError as error:
        reason = "the address is in use" if "in use" in str(error) else (error.strerror or str(error))
        raise ConfigError(
            f"cannot listen on {where}: {reason}; choose another with --port or --host", param="port"
        ) from error


def url_of(listener: socket.socket) -> str:
    """The address that a browser on this machine can open."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
