"""The network of `Decoder`: RMSNorm, RoPE, SwiGLU, grouped heads, no biases, untied embeddings.

Its attention is a plain call of `torch.nn.functional.scaled_dot_product_attention`, which `LighthouseCallback` patches
as it would anybody's. It is built for very long sequences: the logits of a few thousand tokens exist at a time, and a
block is compiled as one graph.
"""

# B batch, N tokens, W width of the model, H query heads, G key/value heads, D head dim, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from lightning_lighthouse.context.group import local_positions

# In memory at a time, 256 MiB of float32. A chunk costs the CPU some two milliseconds, there, recomputed and back: with
# few logits in it the GPU waits
NUM_LOGITS = 2**26
SMALLEST_CHUNK = 8192

# nothing here draws random numbers
recompute = partial(activation_checkpoint, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder; `dim` is the width of the model, `ffn_dim` that of the SwiGLU inside."""

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.num_heads


PRESETS = {
    # learns to spell in about three minutes on two CPU cores
    "toy": Shape(num_layers=4, dim=128, num_heads=4, num_kv_heads=4, ffn_dim=384, rope_theta=1e4),
    # books at 32K tokens on one GPU
    "small": Shape(num_layers=12, dim=512, num_heads=4, num_kv_heads=4, ffn_dim=1536, rope_theta=1e4),
    "base": Shape(num_layers=16, dim=768, num_heads=6, num_kv_heads=6, ffn_dim=2048, rope_theta=1e4),
    # the paper's model (arXiv 2605.06554), over bytes
    "paper": Shape(num_layers=30, dim=1024, num_heads=8, num_kv_heads=8, ffn_dim=1536, rope_theta=1e4),
}


def rotary_tables(num_tokens: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of N positions, each `[N, 1, 1, D / 2]` float32: from 0 on, or from this rank's first token."""
    return rotary_tables_at(local_positions(num_tokens, device), head_dim, theta)


def rotary_tables_at(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions, `[..., N] -> [..., N, 1, 1, D / 2]` float32, for all heads and both halves."""
    # float32 angles are off by 0.03 rad at a million tokens; MPS has nothing wider
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angles = (positions.to(dtype)[..., None] * theta**-exponents)[..., None, None, :]
    return angles.cos().float(), angles.sin().float()


def rotate(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE, channel i paired with channel i + D / 2, in float32; returns the dtype of x."""
    halves = x_BNHD.unflatten(-1, (2, -1))
    # a flip, not a concatenation: one pass over x once compiled, forward and backward
    sign = torch.arange(-1.0, 2.0, 2.0, device=x_BNHD.device).unsqueeze(-1)
    return (halves * cos + halves.flip(-2) * (sign * sin)).flatten(-2).to(x_BNHD.dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm that keeps the dtype of its input, float32 inside."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        # torch takes its fused kernel only when input and weight share a dtype
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped heads, through stock SDPA."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        self.head_dim = shape.head_dim
        # one product for q, k and v: one sum of gradients instead of three
        self.qkv = nn.Linear(shape.dim, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(self, x_BNW: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend: `[B, N, W] -> [B, N, W]`."""
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q_BNHD, k_BNGD, v_BNGD = self.qkv(x_BNW).unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)
        q_BNHD, k_BNGD = rotate(q_BNHD, cos, sin), rotate(k_BNGD, cos, sin)
        o_BHND = F.scaled_dot_product_attention(
            q_BNHD.transpose(1, 2),
            k_BNGD.transpose(1, 2),
            v_BNGD.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.out(o_BHND.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(shape.dim, 2 * shape.ffn_dim, bias=False)
        self.down = nn.Linear(shape.ffn_dim, shape.dim, bias=False)

    def forward(self, x_BNW: Tensor) -> Tensor:
        """Transform each token: `[B, N, W] -> [B, N, W]`."""
        gate, up = self.gate_up(x_BNW).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm layer of the decoder."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.dim, eps=1e-5)
        self.attention = Attention(shape)
        self.feed_forward_norm = RMSNorm(shape.dim, eps=1e-5)
        self.feed_forward = FeedForward(shape)

    def forward(self, x_BNW: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Add what attention and SwiGLU have to say: `[B, N, W] -> [B, N, W]`."""
        x_BNW = x_BNW + self.attention(self.attention_norm(x_BNW), cos, sin)
        return x_BNW + self.feed_forward(self.feed_forward_norm(x_BNW))


class Head(nn.Module):
    """The last norm and the projection to the vocabulary, with the loss on top."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps=1e-5)
        self.projection = nn.Linear(dim, vocab_size, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        """Scores of the next token: `[..., W] -> [..., V]`."""
        weight = self.projection.weight
        vocab_size = len(weight)
        if vocab_size % 64:
            # tensor cores want aligned rows, and 257 is a prime
            weight = F.pad(weight, (0, 0, 0, -vocab_size % 64))
        return F.linear(self.norm(x), weight)[..., :vocab_size]

    def forward(self, x: Tensor, targets: Tensor, reduction: Literal["sum", "none"] = "sum") -> Tensor:
        """The cross-entropy of `[tokens, W]` against `[tokens]`, softmax in float32, in nats: its sum, or each."""
        logits = self.logits(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction=reduction)


def chunk_for(vocab_size: int) -> int:
    """Tokens of a chunk of logits: a power of two, so that few sequences end in a chunk of another size."""
    return max(SMALLEST_CHUNK, 1 << (NUM_LOGITS // vocab_size).bit_length() >> 1)


def chunks_of(x_BNW: Tensor, targets_BN: Tensor, chunk: int) -> list[tuple[Tensor, Tensor]]:
    """The tokens of a batch and their targets, `chunk` at a time: `[chunk, W]` and `[chunk]`, the last ones fewer."""
    return list(zip(x_BNW.flatten(0, 1).split(chunk), targets_BN.flatten().split(chunk), strict=True))


def total_of_chunks(loss: Callable[[Tensor, Tensor], Tensor], chunks: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of a loss over chunks of tokens, whose logits are computed again in the backward pass.

    Those of the last chunk are kept: the backward pass begins with them.
    """
    *earlier, last = chunks
    return torch.stack([*(recompute(loss, x, targets) for x, targets in earlier), loss(*last)]).sum()
