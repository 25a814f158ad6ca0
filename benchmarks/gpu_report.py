"""Where `gpu_check.py` puts its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Report:
    """Writes each result at once."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._records, self._text = folder / "gpu_check.jsonl", folder / "gpu_check.txt"

    def add(self, section: str, what: str, **facts: Any) -> None:
        with self._records.open("a") as file:
            file.write(json.dumps({"section": section, "what": what, **facts}) + "\n")
        words = "  ".join(
            f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
        )
        line = f"{section:9} {what:44} {words}"
        with self._text.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
