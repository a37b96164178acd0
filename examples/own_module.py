"""Your own LightningModule, trained with the callback on your own text.

    python examples/own_module.py [TEXT]

TEXT is a folder of text files, JSONL or Parquet; without it, Python's own source code. The sizes here suit a CPU.
"""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lighthouse import LighthouseCallback, LighthouseRecipe, LongContextEvaluation

TOKENS, WIDTH, HEADS, VOCABULARY = 1_024, 64, 4, 257


class Block(nn.Module):
    """A layer of a transformer, as you may have written it: nothing in it knows of Lighthouse."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        # this call is what the callback routes: causal, without a mask and without dropout
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norms[1](x))


class Model(pl.LightningModule):
    """A language model over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["tokens"]
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(text: str | None = None, steps: int = 60) -> None:
    """Three windows to one Lighthouse layer, then dense; at the end, what the model can do with its context."""
    pl.seed_everything(42)
    cheap_layers = {"layer_types": ["window", "window", "window", "lighthouse"], "window": 64}
    trainer = pl.Trainer(
        max_steps=steps,
        val_check_interval=20,
        check_val_every_n_epoch=None,
        limit_val_batches=4,
        log_every_n_steps=10,
        callbacks=[
            LighthouseCallback(switch_at=0.75, **cheap_layers),
            LongContextEvaluation(every_n_validations=0, num_samples=2),
        ],
    )
    trainer.fit(Model(), LighthouseRecipe(source=text, seq_len=TOKENS, batch_size=2, num_workers=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
