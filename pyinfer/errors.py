"""The errors a user can cause. Each names the value, the limit and the remedy in one line."""

from __future__ import annotations


class PyinferError(Exception):
    """Base of every error that a user's input can cause; its text is one line fit for a terminal or an HTTP body.

    `param` names the offending option or field when there is one; `http_status` is what the server answers with.
    """

    http_status = 400
    error_type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class GGUFError(PyinferError):
    """A GGUF file that is cut off, corrupt, hostile or of an unknown kind."""


class ModelError(PyinferError):
    """A well-formed GGUF that cannot be run: unknown architecture, missing key or tensor, wrong shape."""


class ModelNotFoundError(PyinferError):
    """A model reference that resolves to nothing."""

    http_status = 404


class TokenizerError(PyinferError):
    """A vocabulary that cannot be used, or a text that it cannot encode."""


class ConvertError(PyinferError):
    """A checkpoint that cannot be converted, or a model that cannot be quantized."""


class TemplateError(PyinferError):
    """A chat template that is missing, broken, or refuses the conversation."""


class RequestError(PyinferError):
    """A request that can never be served as it stands: out-of-range parameter, prompt over the context."""


class BackendError(PyinferError):
    """A backend that is missing or cannot run here."""


class DeviceMemoryError(BackendError):
    """A device has too little memory for what was to be put on it."""


class DeviceLostError(BackendError):
    """A device that answers no more, as after a fault in a kernel: only a new process can use it."""

    http_status = 500
    error_type = "server_error"


class DownloadError(PyinferError):
    """A model that could not be fetched or did not verify."""

    http_status = 502


class ConfigError(PyinferError):
    """An option, environment variable or config file that makes no sense."""


class EngineError(PyinferError):
    """The engine failed while it ran a request: a fault of ours or of the machine, not of the request."""

    http_status = 500
    error_type = "server_error"


class UnavailableError(PyinferError):
    """The engine takes no requests: it is shutting down or has stopped."""

    http_status = 503
    error_type = "server_error"


class OverloadedError(PyinferError):
    """A request that would wait longer than the server lets one wait; `retry_after` seconds later it would not."""

    http_status = 429
    error_type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, code="overloaded")
        self.retry_after = retry_after
