"""`Decoder`: a Llama-style language model to pre-train, as a LightningModule: loss, optimizer, schedule, sharding."""

# B batch, N tokens, W width of the model, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_lighthouse.model.language_model import LanguageModel, check, tokens_of
from lightning_lighthouse.model.network import (
    PRESETS,
    Block,
    Head,
    Shape,
    chunk_for,
    chunks_of,
    recompute,
    rotary_tables,
    rotary_tables_at,
    total_of_chunks,
)
from lightning_lighthouse.model.targets import mean_of


class Decoder(LanguageModel):
    """A Llama-style language model with its loss, optimizer and schedule.

    A batch is `{"tokens": [B, N + 1] int64}` or that tensor alone: the first N tokens are read, the last N predicted.
    Where it holds documents too, as `LighthouseRecipe` adds them, `documents(batch)` says where those of the N lie;
    labels and masks are read as `LanguageModel` says. The training loss is returned, not logged; validation logs
    `val/loss` in nats per token and, where the data module has `validation_bytes_per_token`, `val/bits_per_byte`.

    Args:
        preset: The sizes to start from. "toy": 0.9M parameters, learns on a CPU; "small": 41M; "base": 114M;
            "paper": 268M, the model of the paper. The counts are for 257 tokens of vocabulary.
        num_layers: Blocks; None: the preset's.
        dim: Width of the model, a multiple of twice `num_heads`; None: the preset's.
        num_heads: Query heads; None: the preset's.
        num_kv_heads: Key/value heads, a divisor of `num_heads`; None: the preset's, or a given `num_heads`.
        ffn_dim: Width of the SwiGLU; None: the preset's.
        rope_theta: Base of the rotary frequencies; None: the preset's.
        vocab_size: Tokens in the vocabulary; the default is the 256 bytes and an end-of-document token.
        learning_rate: Peak learning rate of AdamW.
        betas: Decay rates of AdamW's two averages.
        eps: AdamW's term against division by zero.
        weight_decay: Weight decay of the matrices; the norms have none.
        warmup_steps: Optimizer steps of linear warm-up.
        schedule: What follows the warm-up. "constant": the peak to the end. "wsd": the peak, then a linear decay
            towards 0.
        decay_fraction: Fraction of all steps that "wsd" decays over.
        loss_chunk: Tokens whose logits are in memory at a time; None: as many as have 64 Mi logits, 8,192 or more.
        compile: Compile each block, and the head, with torch.compile; worth it on a GPU.
        checkpoint: What is computed again in the backward pass to save memory: "none", or every "block".
        restart_positions: Rotate by the position within the document, not within the sequence.

    Raises:
        ValueError: A value is out of range, or two do not fit together.
    """

    def __init__(
        self,
        preset: Literal["toy", "small", "base", "paper"] = "toy",
        num_layers: int | None = None,
        dim: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        ffn_dim: int | None = None,
        rope_theta: float | None = None,
        vocab_size: int = 257,
        learning_rate: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        schedule: Literal["constant", "wsd"] = "constant",
        decay_fraction: float = 0.2,
        loss_chunk: int | None = None,
        compile: bool = False,
        checkpoint: Literal["none", "block"] = "none",
        restart_positions: bool = False,
    ) -> None:
        given = dict(locals())
        super().__init__()
        check("preset", preset, preset in PRESETS, "one of " + ", ".join(map(repr, PRESETS)))
        check("checkpoint", checkpoint, checkpoint in ("none", "block"), "'none' or 'block'")
        check("vocab_size", vocab_size, vocab_size >= 1, "at least 1")
        self.save_hyperparameters()
        self.keep_own_settings(given)
        self.check_hyperparameters()
        overrides: dict[str, Any] = {
            field.name: given[field.name] for field in fields(Shape) if given[field.name] is not None
        }
        if "num_heads" in overrides:
            overrides.setdefault("num_kv_heads", overrides["num_heads"])
        self.shape = replace(PRESETS[preset], **overrides)
        _check_shape(self.shape)

        self.embedding = nn.Embedding(vocab_size, self.shape.dim)
        self.blocks = nn.ModuleList(Block(self.shape) for _ in range(self.shape.num_layers))
        self.head = Head(self.shape.dim, vocab_size)
        self._initialize()

    @property
    def rotary(self) -> dict[str, float | str]:
        """How q and k are rotated, for pooling that must know it (routing/rotary.py)."""
        return {"rope_theta": self.shape.rope_theta, "pairing": "half"}

    @property
    def num_vocabulary(self) -> int:
        """Tokens that the model knows."""
        return int(self.own_settings["vocab_size"])

    @property
    def _chunk(self) -> int:
        return int(self.own_settings["loss_chunk"] or chunk_for(self.num_vocabulary))

    def _initialize(self) -> None:
        # every block adds twice to the stream, whose variance is then independent of the depth
        depth_scale = (2 * self.shape.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_stream = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=0.02 * (depth_scale if into_stream else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next token: `[B, N] -> [B, N, V]`, all of them in memory."""
        return self.head.logits(self.hidden(tokens))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """What the last block leaves, before the last norm: `[B, N] -> [B, N, W]`.

        Args:
            tokens: `[B, N]`.
            positions: `[B, N]`, of each token; None: from 0 on.
        """
        x_BNW = self.embedding(tokens)
        # the stream is as wide as the products that feed it: half the memory traffic of a float32 one
        if torch.is_autocast_enabled(x_BNW.device.type):
            x_BNW = x_BNW.to(torch.get_autocast_dtype(x_BNW.device.type))
        if positions is None:
            cos, sin = rotary_tables(tokens.shape[1], self.shape.head_dim, self.shape.rope_theta, tokens.device)
        else:
            cos, sin = rotary_tables_at(positions, self.shape.head_dim, self.shape.rope_theta)
        saves_memory = self.own_settings["checkpoint"] == "block" and torch.is_grad_enabled()
        for block in self.blocks:
            x_BNW = recompute(block, x_BNW, cos, sin) if saves_memory else block(x_BNW, cos, sin)
        return x_BNW

    def loss(self, batch: Mapping[str, Tensor] | Tensor) -> Tensor:
        """The mean cross-entropy of a batch in nats per token.

        Raises:
            ValueError: The batch holds no such tokens, or packs documents and nobody keeps attention inside them.
        """
        tokens = tokens_of(batch)
        self.look_for_documents(batch)
        targets, count = self.targets(batch)
        x_BNW = self.hidden(tokens[:, :-1], self.positions(batch, tokens[:, :-1]))
        return mean_of(total_of_chunks(self.head, chunks_of(x_BNW, targets, self._chunk)), count)

    def token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of each target in nats, all `[B, N]`; what `FutureLeakProbe` and others ask for."""
        x_BNW = self.hidden(inputs, self.positions_set(inputs))
        parts = [self.head(x, y, reduction="none") for x, y in chunks_of(x_BNW, targets, self._chunk)]
        return torch.cat(parts).view_as(targets)

    def next_token_logits(self, inputs: Tensor) -> Tensor:
        """Scores of the token after the last: `[B, N] -> [B, V]`; what `LongContextEvaluation` asks for."""
        return self.head.logits(self.hidden(inputs)[:, -1])

    def configure_model(self) -> None:
        """Compile the blocks and the head in place; shard under ModelParallelStrategy. Parameters keep their names."""
        if self.own_settings["compile"]:
            for part in [*self.blocks, self.head]:
                # fixed lengths: the sizes of the pyramid follow from N
                part.compile(fullgraph=not self.keeps_documents(), dynamic=False)
        if self.device_mesh is not None and not any(isinstance(p, DTensor) for p in self.parameters()):
            self._shard(self.device_mesh["data_parallel"])

    def _shard(self, mesh: DeviceMesh) -> None:
        """FSDP2: a group of parameters for each block, and one for the embedding and the head.

        The head stays whole from its first chunk of tokens to the last one's backward pass.
        """
        # its import takes a second that one process need not wait
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)
        # Lightning calls the steps, which call `loss`, not the forward that FSDP2 knows of
        register_fsdp_forward_method(self, "loss")
        register_fsdp_forward_method(self, "token_losses")
        register_fsdp_forward_method(self, "next_token_logits")


def _check_shape(shape: Shape) -> None:
    for field in fields(shape):
        value = getattr(shape, field.name)
        check(field.name, value, value > 0, "greater than 0")
    if shape.dim % (2 * shape.num_heads):
        raise ValueError(f"dim must be a multiple of 2 * num_heads = {2 * shape.num_heads}, got {shape.dim}")
    if shape.num_heads % shape.num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads = {shape.num_heads}, got {shape.num_kv_heads}")
