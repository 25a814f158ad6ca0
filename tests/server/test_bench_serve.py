"""`pyinfer bench-serve` against a fake OpenAI server, and once against our own."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_openai import FakeOpenAI, serve_fake

from pyinfer.loadgen.http_client import HttpClient
from pyinfer.loadgen.openai_stream import LoadRequest, RequestRecord, SendOptions, send
from pyinfer.loadgen.runner import RunResult, run_load, warm_up

pytestmark = pytest.mark.server

Cli = Callable[..., tuple[int, str, str]]
ASK = LoadRequest([5, 6, 7], 3, 6)


def exchange(fake: FakeOpenAI, request: LoadRequest = ASK, **options: Any) -> RequestRecord:
    record = RequestRecord(request.n_prompt)
    asyncio.run(send(HttpClient(fake.url, "key"), request, SendOptions("fake", **options), record))
    return record


def load(fake: FakeOpenAI, n: int, **options: Any) -> RunResult:
    return asyncio.run(run_load(HttpClient(fake.url), [ASK] * n, SendOptions("fake"), **options))


class TestOneRequest:
    @pytest.mark.parametrize("bytes_at_once", [1, 7, 1 << 20])
    def test_record(self, bytes_at_once: int) -> None:
        with serve_fake(FakeOpenAI(first_delay=0.05, delay=0.01, bytes_at_once=bytes_at_once)) as fake:
            record = exchange(fake, temperature=0.5, extra_body={"top_k": 3})
        assert record.is_ok and (record.n_prompt, record.n_output, record.n_cached) == (7, 6, 2)
        assert len(record.chunk_times) == 6 and record.text == "token " * 6
        assert record.chunk_times[0] - record.start >= 0.049 and record.chunk_times == sorted(record.chunk_times)
        assert record.end - record.start >= 0.099 and record.end >= record.chunk_times[-1]
        assert fake.bodies == [
            {
                "model": "fake", "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0.5, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True}, "top_k": 3,
            }
        ]  # fmt: skip
        assert fake.headers[0]["authorization"] == "Bearer key" and fake.headers[0]["host"] in fake.url

    def test_chat(self) -> None:
        """The chunk that names the role carries no text and is no first token."""
        with serve_fake(FakeOpenAI(first_delay=0.05)) as fake:
            record = exchange(fake, LoadRequest("hi", 1, 4), endpoint="chat", ignore_eos=False)
        assert record.is_ok and len(record.chunk_times) == 4 and record.chunk_times[0] - record.start >= 0.049
        assert fake.bodies[0]["messages"] == [{"role": "user", "content": "hi"}] and "ignore_eos" not in fake.bodies[0]

    @pytest.mark.parametrize(
        ("fake", "message"),
        [
            (FakeOpenAI(refuse_every=1), "HTTP 429: "),
            (FakeOpenAI(cut_after=2), ""),
            (FakeOpenAI(break_after=2), "out of luck"),
            (FakeOpenAI(delay=30), "no complete answer within 0.2 s"),
        ],
    )
    def test_errors(self, fake: FakeOpenAI, message: str) -> None:
        with serve_fake(fake):
            record = exchange(fake, timeout=0.2 if fake.delay else 30.0)
        assert record.error is not None and message in record.error and not record.is_ok

    def test_no_server(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        record = exchange(FakeOpenAI(url=f"http://127.0.0.1:{port}"))
        assert record.error is not None and str(port) in record.error


class TestRun:
    def test_concurrency_is_bounded(self) -> None:
        with serve_fake(FakeOpenAI(delay=0.005)) as fake:
            result = load(fake, 12, max_concurrency=3)
            assert fake.most_running == 3 and all(r.is_ok for r in result.records)
        with serve_fake(FakeOpenAI(gather=12)) as fake:
            assert all(r.is_ok for r in load(fake, 12).records)

    def test_arrivals_are_kept(self) -> None:
        from pyinfer.loadgen.arrivals import arrival_times

        with serve_fake(FakeOpenAI()) as fake:
            before = time.perf_counter()
            result = load(fake, 10, request_rate=20.0, seed=4)
        planned = arrival_times(10, 20.0, seed=4)
        assert all(r.start - before >= at - 1e-3 for r, at in zip(result.records, planned, strict=True))
        assert result.duration >= planned[-1] - 1e-3

    def test_time_limit(self) -> None:
        with serve_fake(FakeOpenAI(delay=0.02)) as fake:
            requests = [LoadRequest([1], 1, 2), LoadRequest([1], 1, 100_000)]
            result = asyncio.run(run_load(HttpClient(fake.url), requests, SendOptions("fake"), time_limit=2.0))
        quick, slow = result.records
        assert quick.is_ok and slow.error == "not done within the run's 2 s" and len(slow.chunk_times) > 1

    def test_failures_are_counted_and_heard(self) -> None:
        heard: list[RequestRecord] = []
        with serve_fake(FakeOpenAI(refuse_every=3)) as fake:
            result = load(fake, 9, max_concurrency=1, on_done=heard.append)
        assert [r.is_ok for r in result.records] == [True, True, False] * 3 and heard == result.records

    def test_warm_up(self) -> None:
        with serve_fake(FakeOpenAI(refuse_every=2)) as fake:
            failure = asyncio.run(warm_up(HttpClient(fake.url), [ASK] * 5, SendOptions("fake")))
        assert failure is not None and len(fake.bodies) == 2


class TestCommand:
    @pytest.fixture(autouse=True)
    def home(self, own_home: Path) -> None:
        pass

    def run(self, cli: Cli, fake: FakeOpenAI, *args: str) -> tuple[int, str, str]:
        return cli("bench-serve", "--base-url", f"{fake.url}/v1", "--num-prompts", "8", "--output-len", "5", *args)

    def test_json(self, cli: Cli) -> None:
        with serve_fake(FakeOpenAI()) as fake:
            args = ["--input-len", "20", "--save-detailed", "--warmup", "2", "--metric-percentiles", "50,99.9"]
            code, out, err = self.run(cli, fake, "-o", "json", "--goodput", "ttft:60000 e2el:60000", *args)
        assert code == 0, err
        result = json.loads(out)
        assert (result["completed"], result["failed"], result["model_id"]) == (8, 0, "fake")
        assert (result["total_output_tokens"], result["output_lens"]) == (40, [5] * 8)
        assert result["request_goodput"] == result["request_throughput"] == pytest.approx(8 / result["duration"])
        assert result["output_throughput"] == pytest.approx(40 / result["duration"])
        assert result["mean_ttft_ms"] == pytest.approx(1e3 * sum(result["ttfts"]) / 8)
        assert result["p50_itl_ms"] == pytest.approx(result["median_itl_ms"]) and "p99.9_e2el_ms" in result
        assert [len(gaps) for gaps in result["itls"]] == [4] * 8
        assert len(fake.bodies) == 10 and all(len(body["prompt"]) == 20 for body in fake.bodies)
        assert len({tuple(body["prompt"]) for body in fake.bodies}) == 10  # the warm-up's prompts are others
        assert "8 of 8 requests" in err

    def test_text(self, cli: Cli) -> None:
        with serve_fake(FakeOpenAI(refuse_every=4)) as fake:
            code, out, err = self.run(cli, fake, "--percentile-metrics", "ttft,e2el", "--max-concurrency", "1")
        assert code == 0 and "6 of 8 in" in out and "2 failed: HTTP 429" in err
        assert [line.split()[0] for line in out.splitlines()[-3:]] == ["MS", "TTFT", "E2EL"]

    def test_tokens_are_counted_if_the_server_does_not(self, cli: Cli) -> None:
        with serve_fake(FakeOpenAI(usage=False)) as fake:
            out = self.run(cli, fake, "-o", "json", "--input-len", "9")[1]
        result = json.loads(out)
        assert (result["total_input_tokens"], result["total_output_tokens"]) == (72, 40)

    def test_sharegpt_and_shared_prefix(self, cli: Cli, tmp_path: Path) -> None:
        path = tmp_path / "s.json"
        turns = [[{"from": "human", "value": f"what is {i} plus one"}, {"from": "gpt", "value": "a b c d e f"}]
                 for i in range(9)]  # fmt: skip
        path.write_text(json.dumps([{"conversations": t} for t in turns])[:-1])
        with serve_fake(FakeOpenAI()) as fake:
            args = [
                "bench-serve",
                "--base-url",
                fake.url,
                "--dataset",
                "sharegpt",
                "--dataset-path",
                str(path),
                "-o",
                "json",
            ]
            assert json.loads(cli(*args, "--num-prompts", "8")[1])["total_output_tokens"] == 48
            assert {body["prompt"] for body in fake.bodies} == {f"what is {i} plus one" for i in range(9)}
            code, _, err = cli(*args, "--num-prompts", "9")
            assert code == 1 and "9 of the file's 9 conversations are usable and 10 are needed" in err
            fake.bodies.clear()
            assert self.run(cli, fake, "--dataset", "shared-prefix", "--prefix-len", "30", "--input-len", "4")[0] == 0
            assert len({tuple(body["prompt"][:30]) for body in fake.bodies}) == 1
            assert all(len(body["prompt"]) == 34 for body in fake.bodies)

    def test_what_goes_wrong(self, cli: Cli) -> None:
        with serve_fake(FakeOpenAI(refuse_every=1)) as fake:
            code, _, err = self.run(cli, fake)
            assert code == 1 and "the warm-up request failed: HTTP 429" in err
            code, _, err = self.run(cli, fake, "--warmup", "0")
            assert code == 1 and "all 8 requests failed; the first: HTTP 429" in err
        code, _, err = self.run(cli, fake)
        assert code == 1 and f"no server at {fake.url}" in err and "pyinfer serve" in err
        with serve_fake(FakeOpenAI(tokenizes=False)) as fake:
            code, _, err = self.run(cli, fake)
        assert code == 1 and "--tokenizer" in err

    @pytest.mark.parametrize(
        "args",
        [
            ["--request-rate", "0"], ["--request-rate", "fast"], ["--dataset", "sonnet"], ["--goodput", "itl:3"],
            ["--metric-percentiles", "101"], ["--percentile-metrics", "tps"], ["--extra-body", "[]"],
            ["--prefix-len", "5"], ["--dataset", "sharegpt", "--input-len", "5"], ["--save-detailed"],
            ["--endpoint", "responses"], ["-o", "csv"], ["--range-ratio", "2"],
        ],
    )  # fmt: skip
    def test_wrong_usage(self, args: list[str], cli: Cli) -> None:
        code, out, err = cli("bench-serve", *args)
        assert code == 2 and out == "" and "Error:" in err

    def test_plot(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        code, _, err = cli("bench-serve", "--plot", str(tmp_path / "x.png"))
        assert code == 1 and "pyinfer-gguf[plots]" in err
        monkeypatch.undo()
        pytest.importorskip("matplotlib")
        monkeypatch.setenv("COLUMNS", "200")
        with serve_fake(FakeOpenAI()) as fake:
            assert self.run(cli, fake, "--plot", str(tmp_path / "x.png"))[0] == 0
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("endpoint", ["completions", "chat"])
    def test_our_own_server(self, endpoint: str, server: Any, cli: Cli) -> None:
        code, out, err = cli("bench-serve", "--base-url", server.url, "--num-prompts", "4", "--input-len", "30",
                             "--output-len", "8", "--endpoint", endpoint, "-o", "json")  # fmt: skip
        assert code == 0, err
        result = json.loads(out)
        assert (result["completed"], result["total_output_tokens"]) == (4, 32)
        if endpoint == "completions":
            assert result["total_input_tokens"] == 120
