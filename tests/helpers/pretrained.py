"""Small models as transformers keeps them, of the families that are routed, with random weights; runs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import POSITIONS, TRANSFORMERS

from lightning_lighthouse.cli import commands as cli

# beside the families of families.py: those whose layers have windows of their own, or do more to their logits
GROUPED = TRANSFORMERS["Llama"][1]
OTHERS = {
    "Gemma 3": ("Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 16, "num_hidden_layers": 6}),
    "Granite": ("GraniteConfig", GROUPED | {"logits_scaling": 3.0}),
    "Cohere": ("CohereConfig", GROUPED | {"logit_scale": 0.3}),
}
FAMILIES = TRANSFORMERS | OTHERS
VOCABULARY = 101

# What `train_run` leaves in the current folder
RUN = Path("runs/recipe/version_0")
TRAINER = "trainer: {accelerator: cpu, max_steps: 3, enable_progress_bar: false, limit_val_batches: 1}\n"
DATA = """\
data:
  init_args: {seq_len: 64, source: text.txt, validation_source: text.txt, num_workers: 0TOKENIZER}
lighthouse: {switch_at: 0.5, layer_types: [lighthouse], attention: {num_levels: 2, pooling_factor: 2, top_k: 8}}
"""
DECODER = """\
model: {init_args: {num_layers: 2, dim: 48, num_heads: 4, num_kv_heads: 2, ffn_dim: 40, learning_rate: 0.1}}
"""
PRETRAINED = """\
model:
  class_path: lightning_lighthouse.huggingface.HuggingFaceDecoder
  init_args: {model: base, rope_theta: 500000.0, learning_rate: 0.01, warmup_steps: 0}
"""
WORDS = ["the", "same", "text", "over", "and", "over", "again", "until", "it", "is", "known", "by", "heart"]


def save_model(folder: Path, family: str = "Llama", **settings: Any) -> str:
    """Save a model of this family, with its random weights; the folder."""
    import transformers

    kind, sizes = (FAMILIES | {"Gemma 2": ("Gemma2Config", GROUPED)})[family]
    no_ids = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])
    config = getattr(transformers, kind)(vocab_size=VOCABULARY, **{**no_ids, **sizes, **settings})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def load_model(folder: str, attention: str | None = "sdpa") -> Any:
    import transformers

    settings = {} if attention is None else {"attn_implementation": attention}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)


def draw_tokens(batch: int = 2, length: int = 97) -> torch.Tensor:
    assert length < POSITIONS
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*WORDS, "<unk>", "</s>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def train_run(model: str) -> None:
    """Train in the current folder: the "decoder" of ours, or the "pretrained" model `base`, which reaches 40 tokens."""
    Path("text.txt").write_text(" ".join(WORDS * 60))
    tokenizer = ""
    if model == "pretrained":
        save_model(Path("base"), max_position_embeddings=40)
        save_tokenizer(Path("base"))
        tokenizer = ", tokenizer: base"
    settings = {"decoder": DECODER, "pretrained": PRETRAINED}[model]
    Path("recipe.yaml").write_text(TRAINER + DATA.replace("TOKENIZER", tokenizer) + settings)
    assert cli.main(["fit", "-c", "recipe.yaml"]) == 0
