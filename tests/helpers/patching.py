"""One step of a small model, patched or not, and what two of them have in common."""

from __future__ import annotations

import foreign
import torch
from foreign import GPT
from torch.utils.checkpoint import checkpoint

from lightning_lighthouse import LighthouseConfig

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)


def tokens(batch=2, length=96, seed=0):
    return torch.randint(foreign.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def run(model, x):
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    return out.detach(), gradients(model)


def same(first, second, exact=True):
    pairs = zip([first[0], *first[1]], [second[0], *second[1]], strict=True)
    return all(torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


class CheckpointedBlocks(GPT):
    use_reentrant = False

    def forward(self, x):
        x = self.embed(x) + self.position(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)
