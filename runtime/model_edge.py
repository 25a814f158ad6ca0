"""`ModelEdge`: the text side of a model, for a process that does not compute: tokenizer, chat template, facts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.chat_template import ChatTemplate
from pyinfer.runtime.model_info import ModelInfo, model_info
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class ModelEdge:
    tokenizer: Tokenizer
    chat_template: ChatTemplate  # false if the model has none
    info: ModelInfo
    chat_params: SamplingParams  # what a chat samples with if its user says nothing


def load_edge(path: str | Path, *, chat_template: Path | None = None) -> ModelEdge:
    """Read it from a GGUF file, which is closed again; `chat_template` is a file that replaces the model's own."""
    with GGUFFile.open(path) as file:
        return ModelEdge(
            tokenizer=load_tokenizer(file),
            chat_template=ChatTemplate.from_gguf(file, override=chat_template),
            info=model_info(file),
            chat_params=SamplingParams.for_chat(file.metadata),
        )
