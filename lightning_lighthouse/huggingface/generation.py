"""What a trained model says to a prompt, by transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.huggingface.dtypes import dtype_on
from lightning_lighthouse.huggingface.rope import reach_of
from lightning_lighthouse.huggingface.trained import Trained


@torch.no_grad()
def go_on(
    trained: Trained,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 42,
    dtype: torch.dtype | None = None,
) -> str:
    """The text that follows a prompt; on the GPU where there is one.

    Of the model's generation config only the tokens that end, begin and fill a text are kept: what it says of sampling,
    as top_k or a repetition penalty, would draw from others than these probabilities.

    Args:
        trained: From `load_trained`.
        prompt: Not empty; as long as the model's positions reach.
        max_new_tokens: To write at most; an end of text ends it before.
        temperature: T draws from softmax(logits / T); 0 takes the likeliest token each time.
        top_p: Draw among the likeliest tokens that have this share of the mass together.
        seed: Of the sampling.
        dtype: That the model runs in, and keeps; None: `dtype_on`.

    Raises:
        ValueError: No tokenizer is known. SettingError where the prompt is empty, or too long for the model.
    """
    if trained.tokenizer is None:
        raise ValueError(f"no tokenizer is known for {trained.weights}: export the run with its data's tokenizer")
    tokens = trained.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if tokens.shape[1] == 0:
        raise SettingError("the prompt must hold at least one token, got none")
    reach = reach_of(trained.model.config.get_text_config())
    if reach is not None and tokens.shape[1] + max_new_tokens > reach:
        raise SettingError(
            f"the prompt and what follows must be at most the model's {reach:,} positions, got {tokens.shape[1]:,} "
            f"tokens and {max_new_tokens:,} to come"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = trained.model
    dtype = dtype or dtype_on(device, model.dtype)
    if dtype != model.dtype:
        for parameter in model.parameters():
            # weights alone: in 16 bits the frequencies of rotary positions would be others
            parameter.data = parameter.to(dtype)
    model.to(device)
    # 0 is none: left out it is 50
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    torch.manual_seed(seed)
    with _tokens_alone(model, trained.tokenizer.eos_token_id):
        written = model.generate(
            tokens.to(model.device),
            attention_mask=torch.ones_like(tokens).to(model.device),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            **{"do_sample": False, **sampling},
        )
    text: str = trained.tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)
    return text


@contextmanager
def _tokens_alone(model: Any, end: int | None) -> Iterator[None]:
    """Inside, the model's generation config says nothing but which tokens end, begin and fill a text.

    `generate` takes from there whatever it is not told, so that to leave a penalty out is not to have none.

    Args:
        model: Of transformers; has its own config again behind this.
        end: The tokenizer's end of a text, where the model knows none.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        # a model that was taught to chat may end a text by several tokens
        eos_token_id=end if own.eos_token_id is None else own.eos_token_id,
        pad_token_id=end if own.pad_token_id is None else own.pad_token_id,
        bos_token_id=own.bos_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = own
