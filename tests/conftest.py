"""Fixtures that every kind of test shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["tiny_models"]  # tests/support/tiny_models.py

LARGE_MODELS = frozenset({"qwen2.5-coder-1.5b"})


@pytest.fixture(scope="session")
def model_path(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """`model_path(name)`: the file of a catalogue model, pulled once into PYINFER_HOME and kept between runs.

    A model of `LARGE_MODELS` is only for tests marked `large`: anything else would download it in a plain run.
    """
    from pyinfer.runtime.hub import resolve
    from pyinfer.runtime.progress import SilentProgress

    large_wanted = "large" in str(request.config.getoption("markexpr")).replace("not large", "")
    paths: dict[str, Path] = {}

    def path_of(name: str) -> Path:
        if name in LARGE_MODELS and not large_wanted:
            pytest.fail(f"{name} is a large download: mark this test `large`")
        if name not in paths:
            paths[name] = resolve(name, SilentProgress())
        return paths[name]

    return path_of
