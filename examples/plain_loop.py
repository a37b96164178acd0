"""The phases without Lightning's Trainer, in a loop of your own, here under Fabric.

    python examples/plain_loop.py

Without Fabric it is the same: leave out the two calls of `fabric`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from own_module import TOKENS, VOCABULARY, Model

from lightning_lighthouse import LighthouseConfig, patch_attention


def main(steps: int = 20) -> None:
    """Three quarters of the steps cheap, then dense."""
    torch.manual_seed(42)
    fabric = Fabric(accelerator="cpu")
    fabric.launch()
    model = Model()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=2e-3))
    patch = patch_attention(
        model,
        LighthouseConfig(top_k=64),
        layer_types=["window", "window", "window", "lighthouse"],
        window=64,
    )
    for step in range(steps):
        patch.set_step(step)
        if step < 0.75 * steps:
            patch.on()
        else:
            patch.dense()
        # a text that repeats itself, for the sake of the example
        tokens = torch.randint(VOCABULARY, (2, 128), generator=torch.Generator().manual_seed(step)).repeat(1, 8)
        tokens = tokens[:, : TOKENS + 1]
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        fabric.backward(loss)
        # after the first batch: every layer was routed, or the error names it
        patch.check()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            print(f"step {step + 1}: {'cheap' if patch.is_on else 'dense'}, loss {loss.item():.3f}")
    patch.restore()


if __name__ == "__main__":
    main()
