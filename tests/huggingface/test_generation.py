"""What `lighthouse generate` draws from: softmax(logits / T) within top_p, whatever the model's own config prefers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained import GROUPED

pytest.importorskip("transformers", reason="needs the extra hf")

import transformers

from lightning_lighthouse.huggingface.generation import go_on
from lightning_lighthouse.huggingface.llama import byte_tokenizer
from lightning_lighthouse.huggingface.trained import Trained

PROMPT = "the text"


@pytest.fixture(scope="module")
def trained() -> Trained:
    """A model of bytes whose mass is spread over many of them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=257, **GROUPED)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    return Trained(model, byte_tokenizer(), Path("nowhere"))


def ids_of(trained: Trained) -> torch.Tensor:
    return trained.tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]


@contextmanager
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[torch.Tensor, int]]]:
    """The probabilities that each token is drawn from, and the token; inside."""
    heard, multinomial = [], torch.multinomial

    def draw(probabilities: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = multinomial(probabilities, *args, **kwargs)
        heard.append((probabilities[0], int(out)))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", draw)
        yield heard


# each draws, or takes, other tokens than the model's probabilities say
PREFERENCES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "penalties": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "top_k": 3, "min_p": 0.5, "typical_p": 0.3},
    "tokens": {"suppress_tokens": list(range(200)), "bad_words_ids": [[210]], "sequence_bias": [[[220], 50.0]]},
    "lengths": {"min_new_tokens": 5, "forced_eos_token_id": 7, "exponential_decay_length_penalty": (0, 9.0)},
    "beams": {"num_beams": 3, "temperature": 0.1, "top_p": 0.1, "do_sample": True},
}


def preferring(trained: Trained, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    config = transformers.GenerationConfig(**PREFERENCES[name])
    monkeypatch.setattr(trained.model, "generation_config", config)


def within(mass: torch.Tensor, top_p: float) -> torch.Tensor:
    """The probabilities of the likeliest tokens that have this share together, the one that crosses it among them."""
    ordered, order = mass.sort(descending=True)
    kept = order[: int((ordered.cumsum(0) < top_p).sum()) + 1]
    return torch.zeros_like(mass).index_put((kept,), mass[kept] / mass[kept].sum())


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize(("temperature", "top_p"), [(2.0, 1.0), (1.0, 1.0), (0.7, 0.4), (1.0, 0.9)])
def test_each_token_is_drawn_from_the_probabilities_at_this_temperature(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, name: str, temperature: float, top_p: float
) -> None:
    preferring(trained, monkeypatch, name)
    with listening(monkeypatch) as heard:
        go_on(trained, PROMPT, 7, temperature=temperature, top_p=top_p)
    ids = ids_of(trained)
    for found, token in heard:
        with torch.no_grad():
            mass = (trained.model(ids).logits[0, -1].float() / temperature).softmax(-1)
        torch.testing.assert_close(found, within(mass, top_p), rtol=1e-3, atol=1e-6)
        ids = torch.cat((ids, torch.tensor([[token]])), 1)
    assert len(heard) == 7


def test_rare_tokens_are_drawn_too(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(monkeypatch) as heard:
        for seed in range(300):
            go_on(trained, PROMPT, 1, temperature=2.0, seed=seed)
    # of 257; transformers draws from 50 unless told otherwise
    assert len({token for _, token in heard}) > 100


@pytest.mark.parametrize("name", PREFERENCES)
def test_at_temperature_0_the_likeliest_token_is_taken_each_time(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    preferring(trained, monkeypatch, name)
    before = trained.model.generation_config
    said = before.to_dict()
    ids = ids_of(trained)
    prompt = ids.shape[1]
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat((ids, trained.model(ids).logits[:, -1:].argmax(-1)), 1)
    assert go_on(trained, PROMPT, 6) == trained.tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)
    assert trained.model.generation_config is before
    assert before.to_dict() == said


def test_each_token_that_ends_a_text_in_the_models_own_config_ends_it(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(trained)
    with torch.no_grad():
        first = int(trained.model(ids).logits[0, -1].argmax())
    written, generate = [], trained.model.generate
    monkeypatch.setattr(trained.model, "generate", lambda *a, **k: written.append(generate(*a, **k)) or written[-1])
    for end, length in (([256, first], 1), (None, 6)):
        config = transformers.GenerationConfig(eos_token_id=end, pad_token_id=3)
        monkeypatch.setattr(trained.model, "generation_config", config)
        go_on(trained, PROMPT, 6)
        assert written[-1].shape[1] - ids.shape[1] == length
