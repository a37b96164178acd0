"""The output layer of a transformers model by itself, so that a loss never holds the logits of all tokens."""

# W width of the model, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.checks import SettingError


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """What the model makes of the last hidden states: `[..., W] -> [..., V]`.

    Its output layer, and the few things that families do behind it, which their configs name.
    """
    logits: Tensor = model.get_output_embeddings()(hidden)
    scale, cap = scale_of(model), cap_of(model)
    if scale != 1:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def scale_of(model: Any) -> float:
    """What the output of the last layer is multiplied by: Cohere and Granite have such factors."""
    config = model.config.get_text_config()
    multiplier, divisor = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
    return float((1.0 if multiplier is None else multiplier) / (1.0 if divisor is None else divisor))


def cap_of(model: Any) -> float | None:
    """What bounds the logits, by a tanh: Gemma 2 has such a cap."""
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap


def require_base_model(model: Any) -> None:
    """Make sure that the layers lie in a model of their own, whose last hidden states `logits_of` takes.

    Raises:
        SettingError: They do not, as in Llama 4.
    """
    if model.base_model is model:
        raise SettingError(
            f"{type(model).__name__} does not keep its layers in a base model ({model.base_model_prefix}) as other "
            "models of transformers do, so its loss cannot be computed in chunks: train it with a LightningModule of "
            "your own"
        )


@torch.no_grad()
def check_head(model: Any) -> None:
    """Make sure, on a few tokens, that `logits_of` is all that the model does behind its last hidden states.

    Raises:
        SettingError: It does more, so that its loss would be another one.
    """
    was_training = model.training
    model.eval()
    try:
        tokens = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
        whole = model(input_ids=tokens, use_cache=False).logits
        parts = logits_of(model, model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    finally:
        model.train(was_training)
    if whole.shape != parts.shape or not torch.allclose(whole.float(), parts.float(), rtol=1e-3, atol=1e-3):
        raise SettingError(
            f"{type(model).__name__} does something to its logits that is not known here, so its loss cannot be "
            "computed in chunks: train it with a LightningModule of your own"
        )
