"""Small models as transformers keeps them: folders with random weights, of the families that are routed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import POSITIONS, TRANSFORMERS

# beside the families of families.py: those whose layers have windows of their own, or do more to their logits
GROUPED = TRANSFORMERS["Llama"][1]
OTHERS = {
    "Gemma 3": ("Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 16, "num_hidden_layers": 6}),
    "Granite": ("GraniteConfig", GROUPED | {"logits_scaling": 3.0}),
    "Cohere": ("CohereConfig", GROUPED | {"logit_scale": 0.3}),
}
FAMILIES = TRANSFORMERS | OTHERS
VOCABULARY = 101


def save_model(folder: Path, family: str = "Llama", **settings: Any) -> str:
    """Save a model of this family, with its random weights; the folder."""
    import transformers

    kind, sizes = (FAMILIES | {"Gemma 2": ("Gemma2Config", GROUPED)})[family]
    no_ids = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])
    config = getattr(transformers, kind)(vocab_size=VOCABULARY, **{**no_ids, **sizes, **settings})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def load_model(folder: str) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def draw_tokens(batch: int = 2, length: int = 97) -> torch.Tensor:
    assert length < POSITIONS
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))
