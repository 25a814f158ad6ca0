"""Which of NVIDIA's libraries are taken, by what the driver can use, in folders as its wheels and toolkits have them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pyinfer.errors import BackendError
from pyinfer.kernels_gpu import nvrtc, toolkit

pytestmark = pytest.mark.unit
CUDA_12 = ("cuda_nvrtc/lib/libnvrtc.so.12", "cublas/lib/libcublas.so.12", "cublas/lib/libcublasLt.so.12")
CUDA_13 = ("cu13/lib/libnvrtc.so.13", "cu13/lib/libnvrtc.alt.so.13", "cu13/lib/libcublas.so.13")
NAMES = ["libnvrtc.so.13", "libnvrtc.so.12"]  # of what the system would find


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty, in place of site-packages/nvidia; no toolkit is there."""
    folder = tmp_path / "nvidia"
    monkeypatch.setattr(toolkit, "package_folders", lambda: sorted(folder.iterdir()) if folder.is_dir() else [])
    monkeypatch.setattr(toolkit, "toolkit_folders", lambda: [tmp_path / "toolkit"])
    monkeypatch.setattr(sys, "platform", "linux")
    return folder


def write(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def write_headers(include: Path, version: int) -> Path:
    write(include, "cuda_fp16.h")
    (include / "cuda_runtime_api.h").write_text(f"// CUDA\n#define CUDART_VERSION  {version}\n")
    return include


def serve(monkeypatch: pytest.MonkeyPatch, major: int | None) -> None:
    for module in (toolkit, nvrtc):
        monkeypatch.setattr(module, "driver_major", lambda: major)


@pytest.mark.parametrize("major, wheels", [(None, [13, 12]), (13, [13, 12]), (14, [13, 12]), (12, [12])])
def test_the_newest_that_the_driver_can_use(
    major: int | None, wheels: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, *CUDA_12, *CUDA_13)
    serve(monkeypatch, major)
    of = {12: folder / CUDA_12[0], 13: folder / CUDA_13[0]}
    expected = [path for wheel in wheels for path in (of[wheel], f"libnvrtc.so.{wheel}")]
    assert toolkit.find_libraries("nvrtc") == expected
    cublas = [path for path in toolkit.find_libraries("cublas") if isinstance(path, Path)]
    assert [path.name for path in cublas] == [f"libcublas.so.{wheel}" for wheel in wheels]
    assert toolkit.has_newer("nvrtc") == (major == 12)


def test_wheels_come_before_toolkits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, *CUDA_12)
    write(tmp_path / "toolkit", "lib64/libnvrtc.so.12", "lib64/libnvrtc.so.13", "lib64/libnvrtc.so.11.2")
    serve(monkeypatch, 12)
    toolkit_file = tmp_path / "toolkit" / "lib64" / "libnvrtc.so.12"
    assert toolkit.find_libraries("nvrtc") == [folder / CUDA_12[0], toolkit_file, "libnvrtc.so.12"]


def test_names_on_windows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ("cuda_nvrtc/bin/nvrtc64_120_0.dll", "cu13/bin/x86_64/nvrtc64_130_0.dll")
    write(folder, *files, "cu13/bin/x86_64/nvrtc64_130_0.alt.dll", "cu13/bin/x86_64/cublas64_13.dll")
    monkeypatch.setattr(sys, "platform", "win32")
    serve(monkeypatch, 13)
    assert toolkit.find_libraries("nvrtc") == [folder / files[1], folder / files[0]]
    assert toolkit.find_libraries("cublas") == [folder / "cu13" / "bin" / "x86_64" / "cublas64_13.dll"]


def test_headers_are_of_the_same_cuda(folder: Path) -> None:
    """Those beside the library first."""
    old, new = write_headers(folder / "cuda_runtime/include", 12090), write_headers(folder / "cu13/include", 13000)
    assert toolkit.find_headers("cuda_fp16.h", 12, folder / CUDA_12[0]) == old
    assert toolkit.find_headers("cuda_fp16.h", 13, folder / CUDA_13[0]) == new
    beside = write_headers(folder / "a_toolkit/include", 13010)
    assert toolkit.find_headers("cuda_fp16.h", 13, folder / "a_toolkit/lib64/libnvrtc.so.13") == beside
    assert toolkit.find_headers("cuda_fp17.h", 13, "libnvrtc.so.13") is None


@pytest.mark.parametrize(
    "major, words", [(12, r"serves CUDA 12; .*gguf\[gpu\]"), (13, r"no CUDA 13 headers .*gguf\[gpu13\]")]
)
def test_what_is_missing_is_one_line(major: int, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC 13 alone, without headers."""
    write(folder, *CUDA_13)
    write_headers(folder / "cuda_runtime/include", 12090)
    serve(monkeypatch, major)
    monkeypatch.setattr(nvrtc, "_load", lambda path: _open(path))
    with pytest.raises(BackendError, match=words) as caught:
        nvrtc.load_nvrtc.__wrapped__()
    assert "\n" not in str(caught.value)


def test_nothing_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, None)
    monkeypatch.setattr(nvrtc, "_load", lambda path: _open(path))
    with pytest.raises(BackendError, match=r"^no NVRTC was found; pip install 'pyinfer-gguf\[gpu\]'$"):
        nvrtc.load_nvrtc.__wrapped__()


def _open(path: Path | str) -> object:
    if not isinstance(path, Path):
        raise OSError(path)
    return object()
