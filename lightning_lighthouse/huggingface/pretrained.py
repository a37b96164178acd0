"""A pretrained transformers model as it is: a folder, a name or a .gguf file, to be evaluated."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.huggingface.reading import read_config, read_tokenizer, read_weights
from lightning_lighthouse.huggingface.rope import reach_of
from lightning_lighthouse.huggingface.tokenizers import PretrainedTokenizer


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
        return reach_of(self.model.config.get_text_config())

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])


def load_pretrained(model: str, dtype: torch.dtype) -> tuple[PretrainedModel, PretrainedTokenizer | None]:
    """The model, and its tokenizer where it has one.

    Args:
        model: A folder that transformers saved, a name that it can load, or a `.gguf` file.
        dtype: Of the weights.

    Raises:
        ValueError: It cannot be read, or a package is missing that reads it.
    """
    try:
        config = read_config(model)
        # any attention that the family has: nothing need be routed
        loaded = read_weights(model, config, dtype, attention=None)
        tokenizer = read_tokenizer(model)
    except SettingError as error:
        # a model that is broken is no wrong setting
        raise ValueError(str(error)) from None
    return PretrainedModel(loaded.eval()), None if tokenizer is None else PretrainedTokenizer(tokenizer)
