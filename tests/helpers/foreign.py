"""Models that know nothing of this package, as a user would bring them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from resumable import ResumableBatches
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

VOCABULARY = 31
TOKENS = 128


class SelfAttention(nn.Module):
    """nanoGPT's shape: one projection to q, k and v, a stock SDPA call inside forward."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.attn = nn.LayerNorm(dim), SelfAttention(dim, heads)
        self.norm_2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU())
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.down(self.mlp(self.norm_2(x)))


class GPT(nn.Module):
    def __init__(self, layers: int = 4, dim: int = 16, heads: int = 2, tokens: int = TOKENS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.position = nn.Embedding(tokens, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def chosen_attention() -> Callable[..., Tensor]:
    """torchtune's way: the function is chosen once, when a model is built, and is kept by its modules."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool) -> Tensor:
        if mask is not None:
            mask = mask[:, None]
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal
        )

    return attend


class GroupedAttention(nn.Module):
    """Written like torchtune's: separate projections, keys and values expanded to the query heads, a kept function."""

    def __init__(self, dim: int, heads: int, kv_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.dropout = heads, kv_heads, dim // heads, dropout
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.is_causal = True
        self.kv_cache = None
        self._attend = chosen_attention()

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k, v = (layer(x).view(batch, length, self.kv_heads, 1, self.head_dim) for layer in (self.k, self.v))
        group = self.heads // self.kv_heads
        k, v = (t.expand(-1, -1, -1, group, -1).flatten(2, 3).transpose(1, 2) for t in (k, v))
        is_causal = self.kv_cache is None and mask is None and self.is_causal
        y = self._attend(q, k, v, mask, self.dropout if self.training else 0.0, is_causal)
        return self.out(y.transpose(1, 2).flatten(2))


class GroupedGPT(GPT):
    """GPT with grouped heads."""

    def __init__(self, layers: int = 4, dim: int = 24, heads: int = 6, kv_heads: int = 2) -> None:
        super().__init__(layers, dim, heads)
        for block in self.blocks:
            block.attn = GroupedAttention(dim, heads, kv_heads)


class ForeignModule(LightningModule):
    """A LightningModule as found in a tutorial. It keeps every training and validation loss it saw."""

    def __init__(self, layers: int = 4, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model or GPT(layers)
        self.losses: list[float] = []
        self.validation_losses: list[float] = []

    def loss(self, batch: Tensor) -> Tensor:
        logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.validation_losses.append(loss.item())
        self.log("val/loss", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Sequences(Dataset[Tensor]):
    """Seeded random tokens with a pattern to learn: every second token repeats the one before."""

    def __init__(self, count: int = 20, tokens: int = TOKENS, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(VOCABULARY, (count, (tokens + 2) // 2), generator=generator)
        self.tokens = drawn.repeat_interleave(2, dim=1)[:, : tokens + 1]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]


class ResumableLoader(ResumableBatches):
    """Batches of `Sequences`, for a run that is resumed."""

    def __init__(self, count: int = 20, batch_size: int = 2) -> None:
        super().__init__(Sequences(count).tokens.split(batch_size))


def forget_places(module: ForeignModule) -> None:
    """Float64, without positions of tokens: a document is the same wherever it lies."""
    module.double()
    torch.nn.init.zeros_(module.model.position.weight)
    module.model.position.weight.requires_grad_(False)


def loader(count: int = 20, batch_size: int = 2, seed: int = 0) -> DataLoader[Tensor]:
    return DataLoader(Sequences(count, seed=seed), batch_size=batch_size)
