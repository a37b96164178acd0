"""A pretrained transformers model as it is: loaded from a folder or a .gguf file, to be evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_lighthouse.checks import shown

CONFIG = "config.json"
GGUF = ".gguf"


class PretrainedModel(LightningModule):
    """Any causal language model of transformers, which is asked for logits and nothing else.

    Args:
        model: From `AutoModelForCausalLM`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Any:
        """Its output for `[B, N]` token ids, without a cache."""
        return self.model(input_ids=inputs, use_cache=False)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: what is measured is a callback's business."""

    @property
    def training_length(self) -> int | None:
        """Tokens of the longest sequence that the model's config says it was made for; None where it does not."""
        length = getattr(self.model.config, "max_position_embeddings", None)
        return length if isinstance(length, int) else None

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])


class PretrainedTokenizer:
    """A tokenizer of transformers, as the data's tokenizers are: bytes to ids, one id behind them.

    Args:
        tokenizer: From `AutoTokenizer`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: bytes) -> list[int]:
        """Ids of one document, without a begin and with an end."""
        # the length that a model allows is no limit of a text
        ids = self._tokenizer(text.decode(), add_special_tokens=False, verbose=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        return [*ids, 0 if end is None else end]


def is_pretrained(path: Path) -> bool:
    """Whether a path is a folder that transformers saved, or a .gguf file."""
    return (path.is_dir() and (path / CONFIG).is_file()) or (path.is_file() and path.suffix == GGUF)


def load_pretrained(path: Path, dtype: torch.dtype) -> tuple[PretrainedModel, PretrainedTokenizer]:
    """The model and its tokenizer; nothing is downloaded, and no code of the folder runs.

    Raises:
        ModuleNotFoundError: transformers is absent, or the package gguf that it reads such files with.
        ValueError: It cannot be loaded.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path} needs transformers: pip install 'lightning_lighthouse[hf]'") from None
    folder, file = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    settings: dict[str, Any] = {"local_files_only": True, **file}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings)
        tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
    except ImportError as error:
        raise ModuleNotFoundError(f"{path} cannot be read: {shown(' '.join(str(error).split()), 240)}") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no model that transformers loads: {shown(' '.join(str(error).split()), 240)}"
        ) from None
    return PretrainedModel(model.eval()), PretrainedTokenizer(tokenizer)
