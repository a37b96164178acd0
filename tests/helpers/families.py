"""Small models of the families that people train, with random weights: tokens in, logits out, nothing downloaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign import GPT, VOCABULARY, GroupedGPT
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lighthouse import LighthouseConfig, lighthouse_attention

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)
LAYERS = 4
POSITIONS = 160
WIDTH = 24
BY_HAND = "lighthouse_by_hand"


@dataclass(frozen=True)
class Family:
    """How to build a model, and how a person would write Lighthouse into some of its layers.

    Args:
        build: A model in training mode.
        by_hand: Context in which the attention layers of these numbers call `lighthouse_attention`.
        blocks: The repeated blocks, which users compile or checkpoint one by one.
    """

    build: Callable[[], nn.Module]
    by_hand: Callable[[nn.Module, list[int]], Any]
    blocks: Callable[[nn.Module], nn.ModuleList]


class Logits(nn.Module):
    """A transformers model as a plain module, called without a mask as in pre-training on packed tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


def build_transformers(kind: str, attention: str = "sdpa", **settings: Any) -> Logits:
    """The causal language model of config class `kind`; skips the test where transformers is missing."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    no_ids = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])
    config = getattr(transformers, kind)(vocab_size=VOCABULARY, **no_ids, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return Logits(model).train()


@contextmanager
def transformers_by_hand(model: nn.Module, layers: list[int]) -> Iterator[None]:
    """Through transformers' own table of attention functions, with nothing of `patch`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module, query, key, value, attention_mask, scaling=None, **settings):
        if module.layer_idx not in layers:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
        assert attention_mask is None
        # rotated q and k are fp32 beside a v in bf16; autocast makes them one for the builtin
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
        return lighthouse_attention(query, key, value, CONFIG, scale=scaling).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register(BY_HAND, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(BY_HAND, sdpa_mask)
    model.model.set_attn_implementation(BY_HAND)
    try:
        yield
    finally:
        model.model.set_attn_implementation("sdpa")


def recomputed(self: nn.Module, *args: Any, **settings: Any) -> Any:
    """The forward of a block, once more in the backward pass."""
    return checkpoint(self.once, *args, use_reentrant=False, **settings)


def checkpoint_blocks(family: Family, model: nn.Module) -> None:
    """Checkpoint the activations of every block, as users of the family do."""
    if isinstance(model, Logits):
        # renamed in transformers 5
        enable = getattr(model.model, "activation_checkpointing_enable", None)
        (enable or model.model.gradient_checkpointing_enable)()
        return
    for block in family.blocks(model):
        block.once = block.forward
        block.forward = MethodType(recomputed, block)


def transformers_blocks(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)


LLAMA_LIKE = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "max_position_embeddings": POSITIONS,
}
GROUPED = LLAMA_LIKE | {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}
GPT_2 = {
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": 3,
    "n_positions": POSITIONS,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
OPT = {
    "hidden_size": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "ffn_dim": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "max_position_embeddings": POSITIONS,
    "dropout": 0.0,
}
TRANSFORMERS = {
    "Llama": ("LlamaConfig", GROUPED),
    "Qwen2": ("Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "Mistral": ("MistralConfig", GROUPED),
    "Gemma": ("GemmaConfig", GROUPED | {"head_dim": 8, "num_key_value_heads": 1}),
    "GPT-2": ("GPT2Config", GPT_2),
    "GPT-NeoX": ("GPTNeoXConfig", LLAMA_LIKE),
    "Phi": ("PhiConfig", LLAMA_LIKE),
    "Phi-3": ("Phi3Config", GROUPED),
    "OPT": ("OPTConfig", OPT),
}


class EncoderLM(nn.Module):
    """A language model of stock nn.TransformerEncoderLayer, causal by mask and hint as PyTorch documents it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 3, 2 * WIDTH, dropout=0.0, batch_first=True) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embed(tokens) + self.position(torch.arange(length, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x)


class SequenceFirstBlock(nn.Module):
    """Pre-norm block around a bare nn.MultiheadAttention, sequence first and without biases: its other layout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 3, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attn(y, y, y, need_weights=False, attn_mask=mask, is_causal=True)[0]


class MultiheadLM(EncoderLM):
    """A language model of bare nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SequenceFirstBlock() for _ in range(LAYERS))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embed(tokens) + self.position(torch.arange(length, device=tokens.device))
        mask = torch.full((length, length), -math.inf, device=tokens.device).triu(1)
        x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.transpose(0, 1))


class MultiheadByHand(nn.MultiheadAttention):
    def forward(self, query, key, value, **settings):
        x = query if self.batch_first else query.transpose(0, 1)
        batch, tokens, width = x.shape
        joint = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(batch, tokens, 3, self.num_heads, -1)
        q, k, v = joint.permute(2, 0, 3, 1, 4)
        y = self.out_proj(lighthouse_attention(q, k, v, CONFIG).transpose(1, 2).reshape(batch, tokens, width))
        return y if self.batch_first else y.transpose(0, 1), None


class SelfAttentionByHand(nn.Module):
    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(lighthouse_attention(q, k, v, CONFIG).transpose(1, 2).flatten(2))


@contextmanager
def class_by_hand(model: nn.Module, layers: list[int], kind: type[nn.Module], name: str) -> Iterator[None]:
    """The attention `name` of these blocks is of another class for a while."""
    modules = [getattr(model.blocks[layer], name) for layer in layers]
    stock = [type(module) for module in modules]
    for module in modules:
        module.__class__ = kind
    try:
        yield
    finally:
        for module, former in zip(modules, stock, strict=True):
            module.__class__ = former


def plain(kind: type[nn.Module], by_hand: type[nn.Module], name: str) -> Family:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return kind()

    return Family(build, lambda model, layers: class_by_hand(model, layers, by_hand, name), lambda model: model.blocks)


@contextmanager
def method_by_hand(attentions: list[nn.Module], name: str, scale: float, answer: Callable[[Tensor], Any]) -> Any:
    """The method `name` of these modules, which takes q, k and v, is Lighthouse for a while."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        return answer(lighthouse_attention(q, k, v, CONFIG, scale=scale))

    former = [vars(attention).get(name) for attention in attentions]
    for attention in attentions:
        setattr(attention, name, attend)
    try:
        yield
    finally:
        for attention, function in zip(attentions, former, strict=True):
            if function is None:
                delattr(attention, name)
            else:
                setattr(attention, name, function)


HEAD_DIM = 8


def build_litgpt() -> nn.Module:
    """LitGPT's model with grouped heads and rotated q and k."""
    litgpt = pytest.importorskip(
        "litgpt", reason="needs litgpt, installed without its dependencies (docs/use/models.md)"
    )
    torch.manual_seed(0)
    config = litgpt.Config(
        block_size=POSITIONS,
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        n_layer=LAYERS,
        n_head=6,
        n_query_groups=2,
        n_embd=6 * HEAD_DIM,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=WIDTH,
    )
    return litgpt.GPT(config)


def litgpt_by_hand(model: nn.Module, layers: list[int]) -> Any:
    attentions = [model.transformer.h[layer].attn for layer in layers]
    name = "scaled_dot_product_attention"
    return method_by_hand(attentions, name, HEAD_DIM**-0.5, lambda out: out.transpose(1, 2))


def build_x_transformers() -> nn.Module:
    """A decoder of x-transformers with rotated q and k and flash attention."""
    package = pytest.importorskip("x_transformers", reason="needs the extra models")
    torch.manual_seed(0)
    layers = package.Decoder(
        dim=WIDTH, depth=LAYERS, heads=3, attn_dim_head=HEAD_DIM, attn_flash=True, rotary_pos_emb=True
    )
    return package.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=POSITIONS, attn_layers=layers)


def x_transformers_blocks(model: nn.Module) -> nn.ModuleList:
    """The attention layers: its other layers are modules of their own."""
    from x_transformers.x_transformers import Attention

    return nn.ModuleList(module for module in model.modules() if isinstance(module, Attention))


def x_transformers_by_hand(model: nn.Module, layers: list[int]) -> Any:
    from x_transformers.attend import Intermediates

    attentions = [x_transformers_blocks(model)[layer].attend for layer in layers]
    return method_by_hand(attentions, "flash_attn", HEAD_DIM**-0.5, lambda out: (out, Intermediates()))


def build_grouped() -> nn.Module:
    torch.manual_seed(0)
    return GroupedGPT()


def grouped_by_hand(model: nn.Module, layers: list[int]) -> Any:
    attentions = [model.blocks[layer].attn for layer in layers]
    return method_by_hand(attentions, "_attend", attentions[0].head_dim ** -0.5 if layers else 1.0, lambda out: out)


FAMILIES = {
    f"transformers {name}": Family(
        lambda kind=kind, settings=settings: build_transformers(kind, **settings),
        transformers_by_hand,
        transformers_blocks,
    )
    for name, (kind, settings) in TRANSFORMERS.items()
} | {
    "litgpt": Family(build_litgpt, litgpt_by_hand, lambda model: model.transformer.h),
    "x-transformers, flash": Family(build_x_transformers, x_transformers_by_hand, x_transformers_blocks),
    "nn.MultiheadAttention": plain(MultiheadLM, MultiheadByHand, "attn"),
    "nn.TransformerEncoderLayer": plain(EncoderLM, MultiheadByHand, "self_attn"),
    "like nanoGPT": plain(GPT, SelfAttentionByHand, "attn"),
    "like torchtune": Family(build_grouped, grouped_by_hand, lambda model: model.blocks),
}
