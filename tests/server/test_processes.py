"""The commands `serve` and `run` as a user starts them: signals, ports, pipes, a terminal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_process import PYINFER, ROOT, serving

from pyinfer.paths import kernels_dir

pytestmark = pytest.mark.server

# an answer that goes on until something ends it
LONG = {"messages": [{"role": "user", "content": "x"}], "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a context that takes seconds to fill."""
    from tiny_models import TinyShape, write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", shape=TinyShape(n_ctx=32768))


def first_events(url: str, n: int, body: dict[str, Any]) -> tuple[httpx.Client, Any, Iterator[str]]:
    client = httpx.Client(timeout=60)
    stream = client.send(
        client.build_request("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}), stream=True
    )
    lines = stream.iter_lines()
    for _ in range(n):
        next(lines)
    return client, stream, lines


def test_disconnects_are_noticed_and_sigterm_finishes_what_runs(model_file: Path) -> None:
    with serving(model_file, "--served-model-name", "one", "--served-model-name", "two") as (process, url):
        assert [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]] == ["one", "two"]
        for streaming in (True, False, True):
            if streaming:
                client, stream, _ = first_events(url, 3, LONG)
                assert httpx.get(f"{url}/stats").json()["running"] == 1
                stream.close()
                client.close()
            else:
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{url}/v1/chat/completions", json=LONG, timeout=0.5)
            for _ in range(200):
                if httpx.get(f"{url}/stats").json()["pages_used"] == 0:
                    break
                time.sleep(0.01)
            assert httpx.get(f"{url}/stats").json()["running"] == 0

        client, stream, lines = first_events(url, 4, {**LONG, "model": "two", "max_tokens": 2000})
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert process.wait(timeout=10) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
        stream.close()
        client.close()
        output = process.stdout.read() if process.stdout else ""
        assert "Traceback" not in output and url in output


def test_what_does_not_end_in_time_is_ended(model_file: Path) -> None:
    """Its stream ends as streams do, and says why."""
    code = (
        "import sys, pyinfer.server.launch as launch; launch.DRAIN_SECONDS = 1\n"
        "from pyinfer.cli.entry import run; sys.exit(run(sys.argv[1:]))"
    )
    with serving(model_file, program=[sys.executable, "-c", code]) as (process, url):
        client, stream, lines = first_events(url, 4, LONG)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"abort"' in rest[-2]
        assert process.wait(timeout=10) == 0
        stream.close()
        client.close()
        output = process.stdout.read() if process.stdout else ""
        assert "Traceback" not in output


def test_first_ctrl_c_waits_and_the_second_exits_130(model_file: Path) -> None:
    with serving(model_file) as (process, url):
        client, stream, _ = first_events(url, 4, LONG)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        stream.close()
        client.close()


def failure(*arguments: str, **options: Any) -> str:
    """The one line on stderr of a command that fails with 1."""
    result = subprocess.run(
        [*PYINFER, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        stdin=subprocess.DEVNULL,
        **options,
    )
    assert result.returncode == 1, result
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_what_cannot_start_says_why(model_file: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in (line := failure("serve", str(model_file), "--port", str(port)))
        assert "in use" in line and "--port" in line
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    assert "broken.gguf" in failure("serve", str(broken), "--port", "0")
    assert "cannot read the chat template" in failure("serve", str(model_file), "--chat-template", "absent")
    assert "no prompt" in failure("run", str(model_file))


def run(model: Path, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PYINFER, "run", str(model), *arguments, "-t", "1", "--kv-cache-memory", "16M"],
        input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=120, encoding="utf-8", errors="replace",
    )  # fmt: skip


def test_run_answers_from_an_argument_and_a_pipe_alike(model_file: Path) -> None:
    argument = run(model_file, "the sea", "-n", "12", stdin="")
    piped = run(model_file, "-n", "12", stdin="the sea\n")
    assert argument.returncode == piped.returncode == 0, argument.stderr
    assert argument.stdout == piped.stdout and argument.stdout.endswith("\n") and len(argument.stdout) > 1
    told = run(model_file, "the sea", "-n", "12", "--system", "be brief", "--temperature", "1", "--verbose")
    assert told.returncode == 0 and told.stderr.startswith("36 prompt tokens")


def test_run_into_a_pipe_that_closes(model_file: Path) -> None:
    command = [*PYINFER, "run", str(model_file), "x", "-t", "1", "--kv-cache-memory", "64M"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert b"Traceback" not in process.stderr.read()


class Terminal:
    """A child on a pseudo terminal; answers prompt_toolkit's question for the cursor's position."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        import pty

        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execvpe(command[0], command, {**os.environ, "TERM": "xterm", **environment})
        self._seen = b""

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, text: str, seconds: float = 30.0) -> str:
        """What came up to `text`."""
        deadline = time.monotonic() + seconds
        while text.encode() not in self._seen:
            assert time.monotonic() < deadline, self._seen[-2000:]
            if select.select([self._fd], [], [], 0.1)[0]:
                data = os.read(self._fd, 65536)
                if b"\x1b[6n" in data:
                    os.write(self._fd, b"\x1b[1;1R")
                self._seen += data
        before, self._seen = self._seen.split(text.encode(), 1)
        return before.decode("utf-8", "replace")

    def exit_code(self) -> int:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if select.select([self._fd], [], [], 0.05)[0]:
                    os.read(self._fd, 65536)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        pytest.fail("the program did not end")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals")
def test_chat_in_a_terminal(model_file: Path, tmp_path: Path) -> None:
    command = [*PYINFER, "run", str(model_file), "-t", "1", "--kv-cache-memory", "64M", "--temperature", "0"]
    (tmp_path / "kernels").symlink_to(kernels_dir())  # a home of its own for the history, without compiling again
    terminal = Terminal(command, {"PYINFER_HOME": str(tmp_path)})
    try:
        terminal.expect("Ctrl-D leaves")
        terminal.send("/set max_tokens 5\r")
        terminal.expect("[max_tokens is 5]")
        terminal.send("/set temperature hot\r")
        terminal.expect("it must be a number")
        terminal.send("/nothing\r")
        terminal.expect("no command /nothing")
        terminal.send('"""two\r')
        terminal.expect("...")
        terminal.send('lines"""\r')
        time.sleep(0.5)
        terminal.send("/show\r")
        assert "max_tokens 5" in terminal.expect(" answer tokens")
        terminal.send("/set max_tokens none\r")
        terminal.expect("[max_tokens is None]")
        terminal.send("/clear\r")
        terminal.expect("forgotten")
        terminal.send("on and on\r")
        time.sleep(1.0)
        terminal.send("\x03")  # Ctrl-C stops the answer; the chat goes on
        time.sleep(0.5)
        terminal.send("/show\r")
        terminal.expect(" answer tokens")
        terminal.send("/bye\r")
        assert terminal.exit_code() == 0
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)
    assert "on and on" in (tmp_path / "history").read_text()
