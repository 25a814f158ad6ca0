"""`pyinfer serve`: the HTTP server."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyinfer.cli.options import EngineOptions, with_engine_options
from pyinfer.errors import EngineError
from pyinfer.runtime.catalogue import DEFAULT_MODEL

if TYPE_CHECKING:
    from pyinfer.cli.loading import LoadingLine
    from pyinfer.runtime.engine_child import EngineChild
    from pyinfer.runtime.engine_client import EngineClient
    from pyinfer.runtime.engine_messages import Loaded
    from pyinfer.runtime.loader import LoadedModel
    from pyinfer.runtime.model_edge import ModelEdge
    from pyinfer.server.background import Background
    from pyinfer.server.service import Service

_PANEL = "Server"


@with_engine_options
def serve(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A path, a name, pypi:PACKAGE or npm:PACKAGE.", show_default=True)
    ] = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.", rich_help_panel=_PANEL)] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0: any that is free.", rich_help_panel=_PANEL)
    ] = 8000,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Ask clients for this key.", rich_help_panel=_PANEL)
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name of the model in the API; may be repeated.", rich_help_panel=_PANEL),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Let pages of this origin call the API; may be repeated.", rich_help_panel=_PANEL
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jinja template instead of the model's own.", rich_help_panel=_PANEL),
    ] = None,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process",
            help="Run the engine in the server's own process: less memory, but nothing answers during a long step.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    *,
    engine: EngineOptions,
) -> None:
    """Serve a model over HTTP: OpenAI's API under /v1, and a chat page."""
    child = None if in_process else _start_engine()  # first thing: it has much to import
    try:
        _serve(model, host, port, api_key, served_model_name, cors_origin, chat_template, engine, child)
    finally:
        if child is not None:
            child.close()


def _start_engine() -> EngineChild:
    from pyinfer.runtime.engine_child import EngineChild

    return EngineChild(_log_level())


def _log_level() -> str:
    return logging.getLevelName(logging.getLogger("pyinfer").getEffectiveLevel()).lower()


def _serve(
    model: str,
    host: str,
    port: int,
    api_key: str | None,
    served_model_name: list[str] | None,
    cors_origin: list[str] | None,
    chat_template: Path | None,
    engine: EngineOptions,
    child: EngineChild | None,
) -> None:
    from pyinfer.runtime.chat_template import read_template
    from pyinfer.server.service import Service

    if chat_template is not None:
        read_template(chat_template)  # a wrong path should not wait for the model
    names = served_model_name or [model_name(model)]
    runner = _Runner(model, engine, chat_template, Service(names), child)
    runner.run(host, port, api_key or None, cors_origin or [])


def model_name(reference: str) -> str:
    """What the API calls a model: a file's stem, or the reference itself."""
    return Path(reference).stem if reference.lower().endswith(".gguf") else reference


class _Runner:
    """One run of the server; holds what has to be closed at its end."""

    def __init__(
        self,
        reference: str,
        engine: EngineOptions,
        chat_template: Path | None,
        service: Service,
        child: EngineChild | None,  # the engine's process; None: it is to run in this one
    ) -> None:
        self._reference = reference
        self._engine = engine
        self._chat_template = chat_template
        self._service = service
        self._child = child
        self._loaded: LoadedModel | None = None
        self._client: EngineClient | None = None
        self._loading: Background | None = None
        self._url = ""

    def run(self, host: str, port: int, api_key: str | None, cors_origins: list[str]) -> None:
        from pyinfer.server.background import Background
        from pyinfer.server.listener import open_socket, url_of

        with open_socket(host, port) as listener:
            self._url = url_of(listener)
            # until the server has handlers of its own; an exception could surface anywhere inside an import
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: os._exit(0))
            self._loading = loading = Background(
                self._load, "pyinfer-loader"
            )  # first: importing the web framework takes long too
            from pyinfer.server.app import create_app
            from pyinfer.server.launch import run_server

            app = create_app(self._service, api_key=api_key, cors_origins=cors_origins)
            verbose = logging.getLogger("pyinfer").isEnabledFor(logging.INFO)
            run_server(app, self._service, listener, loading, access_log=verbose)
        if loading.is_running:
            sys.stdout.flush()
            os._exit(0)  # a compiler cannot be interrupted, and nothing is lost
        if self._client is not None:
            self._client.close()
        if self._loaded is not None:
            self._loaded.close()

    def _load(self) -> None:
        from pyinfer.cli.loading import LoadingLine
        from pyinfer.cli.progress import terminal_progress
        from pyinfer.runtime.hub import resolve
        from pyinfer.server.service import ServedModel

        line = LoadingLine()
        path = resolve(self._reference, terminal_progress())
        try:
            if self._child is None:
                self._client, edge, loaded = self._load_here(path, line)
            else:
                self._client, edge, loaded = self._load_there(path, line, self._child)
        finally:
            line.clear()
        info, n_ctx = edge.info, loaded.limits.n_ctx
        self._service.set_ready(
            ServedModel(
                client=self._client,
                tokenizer=edge.tokenizer,
                template=edge.chat_template,
                n_ctx=n_ctx,
                n_ctx_train=info.n_ctx_train or n_ctx,
                chat_defaults=edge.chat_params,
                path=str(path),
                max_num_seqs=loaded.config.max_sequences,
                description={"n_params": info.n_params, "size": info.size, "n_vocab": info.n_vocab},
            )
        )
        self._announce(edge, loaded)

    def _load_here(self, path: Path, line: LoadingLine) -> tuple[EngineClient, ModelEdge, Loaded]:
        from pyinfer.runtime.engine_client import EngineClient
        from pyinfer.runtime.engine_messages import Loaded
        from pyinfer.runtime.loader import load_model
        from pyinfer.runtime.model_edge import ModelEdge

        self._loaded = it = load_model(
            path, progress=line, chat_template=self._chat_template, **self._engine.as_kwargs()
        )
        edge = ModelEdge(it.tokenizer, it.chat_template, it.info, it.chat_params)
        return EngineClient.in_process(it.engine), edge, Loaded(it.engine.limits, it.config, it.kv_bytes, it.placement)

    def _load_there(self, path: Path, line: LoadingLine, child: EngineChild) -> tuple[EngineClient, ModelEdge, Loaded]:
        from pyinfer.runtime.engine_process import EngineProcess
        from pyinfer.runtime.model_edge import load_edge

        client = EngineProcess(child, log_level=_log_level())
        edges: list[ModelEdge] = []

        def load_text_side() -> ModelEdge:
            edges.append(load_edge(path, chat_template=self._chat_template))
            return edges[0]

        loaded = client.load(path, self._engine.as_kwargs(), lambda: load_text_side().tokenizer, line)
        client.on_failure = self._end
        return client, edges[0], loaded

    def _end(self, reason: str) -> None:
        """The engine is given up: so is the server, whose supervisor may start it anew."""
        assert self._loading is not None
        self._loading.failure = EngineError(reason)

    def _announce(self, edge: ModelEdge, loaded: Loaded) -> None:
        from pyinfer.cli.console import print_facts
        from pyinfer.runtime.sizes import format_binary

        config = loaded.config
        pages = f"{config.n_pages} pages of {config.block_size} tokens"
        print_facts(
            f"Serving {self._service.names[0]}: {self._url}",
            [
                ("model", edge.info.model_type),
                ("context", f"{loaded.limits.n_ctx} tokens of {edge.info.n_ctx_train}"),
                ("KV cache", f"{format_binary(loaded.kv_bytes)}, {pages}, {config.kv_dtype}"),
                ("threads", config.n_threads),
                *((device, what) for device, _, what in (line.partition(": ") for line in loaded.placement)),
                ("chat template", None if edge.chat_template else "none; give one with --chat-template FILE"),
                ("API", f"{self._url}/v1"),
            ],
        )
        sys.stdout.flush()
