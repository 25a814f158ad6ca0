"""Commands that write a file where there is no room for it: the cause is named and nothing is left, by a real limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_up_checkpoint import write_checkpoint
from tiny_models import TinyShape, write_tiny_model

from pyinfer.convert.encode import encode

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's"),
]

# a process whose files may have 6,000 bytes at most, as on a disk with that much room
PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))
from pyinfer.cli.entry import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["convert", "quantize", "quantize --report", "imatrix"])
def test_a_file_that_does_not_fit(command: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", codec="F32", shape=TinyShape(n_embd=256))
    folder, text, out = tmp_path / "checkpoint", tmp_path / "text.txt", tmp_path / "out"
    write_checkpoint(folder)
    text.write_text("In the beginning was the word. " * 40)
    out.mkdir()
    target = str(out / "new.gguf")
    arguments = {
        "convert": ["convert", str(folder), "-o", target, "--type", "f32"],
        "quantize": ["quantize", str(model), target, "q8_0"],
        "quantize --report": ["quantize", str(model), target, "q8_0", "--report", str(text)],
        "imatrix": ["imatrix", str(model), "-f", str(text), "-c", "64", "-o", target],
    }[command]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("pyinfer: error: "), done.stderr
    assert "new.gguf: cannot be written: File too large; nothing is left" in done.stderr
    assert not list(out.iterdir())


def test_code_that_cannot_be_kept(tmp_path: Path) -> None:
    """Machine code in PYINFER_HOME is for the next start only."""
    program = PROGRAM.split("from pyinfer")[0] + (
        "import numpy as np\n"
        "from pyinfer.convert.encode import encode\n"
        "print(encode('Q4_0', np.ones((1, 32), np.float32), np.ones(32, np.float32)).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYINFER_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    expected = encode("Q4_0", np.ones((1, 32), np.float32), np.ones(32, np.float32))
    assert done.stdout.strip() == str(expected.tolist()), done.stderr
    assert not list((tmp_path / "home").rglob("*.nbc"))
