"""A Hugging Face model folder: its JSON files and its tensors, single or sharded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pyinfer.convert.safetensors import StoredTensor, read_header
from pyinfer.errors import ConvertError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_INDEX = "model.safetensors.index.json"


class HFCheckpoint:
    """`tensors` by their names in the checkpoint; `json(name)` is a JSON file of the folder, or {} without one."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            what = "is no folder" if self.folder.exists() else "does not exist"
            raise ConvertError(f"{folder}: {what}; give the folder of a Hugging Face checkpoint (with config.json)")
        if not self.has("config.json"):
            raise ConvertError(f"{folder}: has no config.json; give the folder of a Hugging Face checkpoint")
        self._json: dict[str, dict[str, Any]] = {}
        self.config = self.json("config.json")
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(self._index())

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the folder, read once; {} if there is no such file."""
        if name not in self._json:
            content: Any = {}
            if self.has(name):
                try:
                    content = json.loads((self.folder / name).read_bytes())
                except (ValueError, OSError) as error:
                    raise ConvertError(f"{self.folder / name}: cannot be read: {error}") from None
            if not isinstance(content, dict):
                raise ConvertError(f"{self.folder / name}: holds no JSON object")
            self._json[name] = content
        return self._json[name]

    def text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text("utf-8")
        except (ValueError, OSError) as error:
            raise ConvertError(f"{self.folder / name}: cannot be read: {error}") from None

    def _index(self) -> dict[str, StoredTensor]:
        weight_map = self.json(_INDEX).get("weight_map")
        if self.has(_INDEX) and not isinstance(weight_map, dict):
            raise ConvertError(f"{self.folder / _INDEX}: has no 'weight_map'; fetch it again")
        if weight_map is not None:
            names = sorted(set(map(str, weight_map.values())))
        else:
            names = sorted(path.name for path in self.folder.glob("model*.safetensors"))
        self._check_files(names)
        tensors: dict[str, StoredTensor] = {}
        for name in names:
            for tensor in read_header(self.folder / name).values():
                if tensor.name in tensors:
                    raise ConvertError(f"{name}: tensor {tensor.name} is in {tensors[tensor.name].path.name} too")
                tensors[tensor.name] = tensor
        missing = sorted(set(weight_map or ()) - set(tensors))
        if missing:
            raise ConvertError(
                f"{self.folder}: {_INDEX} lists {len(missing)} tensors that no file holds, such as {missing[0]}; "
                "fetch the checkpoint again"
            )
        return tensors

    def _check_files(self, names: list[str]) -> None:
        for name in names:
            if Path(name).name != name:
                raise ConvertError(f"{self.folder / _INDEX}: names {name!r}, which is not a file of this folder")
            if not self.has(name):
                raise ConvertError(f"{self.folder / name}: is missing; fetch all parts of the checkpoint")
        if names:
            return
        pickles = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        pickles = [name for name in pickles if name != "training_args.bin"]
        if pickles:
            raise ConvertError(
                f"{self.folder / pickles[0]}: is a pickle, and reading one runs any code that it holds; get the "
                "checkpoint as safetensors, or save it so with save_pretrained(..., safe_serialization=True)"
            )
        raise ConvertError(f"{self.folder}: holds no model*.safetensors; fetch the weights of the checkpoint")
