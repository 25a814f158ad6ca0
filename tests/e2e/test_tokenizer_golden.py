"""Token ids of the golden prompts on the pulled models equal llama.cpp's (BOS where the model adds it, special tokens
read).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden import DATA, MODELS

from pyinfer.runtime.tokenizer import load_tokenizer

pytestmark = pytest.mark.e2e
PROMPTS: dict[str, str] = json.loads((DATA / "golden_prompts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("model", sorted(MODELS))
def test_golden_prompts(model: str, model_path: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(model_path(model))
    expected = np.load(DATA / MODELS[model])
    assert len(PROMPTS) == 6
    for name, prompt in PROMPTS.items():
        ids = tokenizer.encode(prompt, parse_special=True)
        assert ids == expected[f"{name}.ids"].tolist(), name
        shown = tokenizer.decode(ids, skip_special=False)
        assert shown.removeprefix(tokenizer.bos_token) == prompt if tokenizer.add_bos else shown == prompt
