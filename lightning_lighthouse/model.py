"""A Llama-style decoder to pre-train: RMSNorm, RoPE, SwiGLU, grouped heads, no biases, untied embeddings.

`Decoder` is the LightningModule. Its attention is a plain call of `torch.nn.functional.scaled_dot_product_attention`,
which `LighthouseCallback` patches as it would anybody's. It is built for very long sequences: the logits of a few
thousand tokens exist at a time, and a block is compiled as one graph.
"""

# B batch, N tokens, W width of the model, H query heads, G key/value heads, D head dim, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint
from torchmetrics import MeanMetric

from lightning_lighthouse.schedule import SettingError

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
    """Cosines and sines of the positions, each `[N, 1, 1, D / 2]` float32, to broadcast over heads and halves."""
    # float32 angles are off by 0.03 rad at a million tokens; MPS has nothing wider
    dtype = torch.float32 if device.type == "mps" else torch.float64
    positions = torch.arange(num_tokens, device=device, dtype=dtype)
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim
    angles = (positions[:, None] * theta**-exponents)[:, None, None]
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

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """The summed cross-entropy of `[tokens, W]` against `[tokens]`, softmax in float32, in nats."""
        logits = self.logits(x)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def chunked_loss(head: Head, x_BNW: Tensor, targets_BN: Tensor, chunk: int) -> Tensor:
    """The mean cross-entropy in nats per token, with the logits of `chunk` tokens in memory at a time.

    Each chunk's logits are computed again in the backward pass instead of being kept.
    """
    chunks = zip(x_BNW.flatten(0, 1).split(chunk), targets_BN.flatten().split(chunk), strict=True)
    sums = [recompute(head, x, targets) for x, targets in chunks]
    return torch.stack(sums).sum() / targets_BN.numel()


class Decoder(pl.LightningModule):
    """A Llama-style language model with its loss, optimizer and schedule.

    A batch is `{"tokens": [B, N + 1] int64}` or that tensor alone: the first N tokens are read, the last N predicted.
    The training loss is returned, not logged; validation logs `val/loss` in nats per token and, where the data module
    has `bytes_per_token`, `val/bits_per_byte`.

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
        loss_chunk: Tokens whose logits are in memory at a time.
        compile: Compile each block, and the head, with torch.compile; worth it on a GPU.
        checkpoint: What is computed again in the backward pass to save memory: "none", or every "block".

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
        loss_chunk: int = 8192,
        compile: bool = False,
        checkpoint: Literal["none", "block"] = "none",
    ) -> None:
        super().__init__()
        _check("preset", preset, preset in PRESETS, "one of " + ", ".join(map(repr, PRESETS)))
        _check("schedule", schedule, schedule in ("constant", "wsd"), "'constant' or 'wsd'")
        _check("checkpoint", checkpoint, checkpoint in ("none", "block"), "'none' or 'block'")
        _check("vocab_size", vocab_size, vocab_size >= 1, "at least 1")
        _check("learning_rate", learning_rate, learning_rate > 0, "greater than 0")
        _check("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
        _check("eps", eps, eps > 0, "greater than 0")
        _check("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        _check("warmup_steps", warmup_steps, warmup_steps >= 0, "at least 0")
        _check("decay_fraction", decay_fraction, 0 < decay_fraction <= 1, "in (0, 1]")
        _check("loss_chunk", loss_chunk, loss_chunk >= 1, "at least 1")
        self.save_hyperparameters()
        overrides: dict[str, Any] = {
            field.name: self.hparams[field.name] for field in fields(Shape) if self.hparams[field.name] is not None
        }
        if "num_heads" in overrides:
            overrides.setdefault("num_kv_heads", overrides["num_heads"])
        self.shape = replace(PRESETS[preset], **overrides)
        _check_shape(self.shape)

        self.embedding = nn.Embedding(vocab_size, self.shape.dim)
        self.blocks = nn.ModuleList(Block(self.shape) for _ in range(self.shape.num_layers))
        self.head = Head(self.shape.dim, vocab_size)
        self._initialize()
        self.bytes_per_token: float | None = None
        # a NaN loss must show; torchmetrics' "disable" would ignore the weights
        self.nats_per_token = MeanMetric(nan_strategy=math.nan)
        self.bits_per_byte = MeanMetric(nan_strategy=math.nan)

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

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the last block leaves, before the last norm: `[B, N] -> [B, N, W]`."""
        x_BNW = self.embedding(tokens)
        # the stream is as wide as the products that feed it: half the memory traffic of a float32 one
        if torch.is_autocast_enabled(x_BNW.device.type):
            x_BNW = x_BNW.to(torch.get_autocast_dtype(x_BNW.device.type))
        cos, sin = rotary_tables(tokens.shape[1], self.shape.head_dim, self.shape.rope_theta, tokens.device)
        saves_memory = self.hparams["checkpoint"] == "block" and torch.is_grad_enabled()
        for block in self.blocks:
            x_BNW = recompute(block, x_BNW, cos, sin) if saves_memory else block(x_BNW, cos, sin)
        return x_BNW

    def loss(self, batch: Mapping[str, Tensor] | Tensor) -> Tensor:
        """The mean cross-entropy of a batch in nats per token; ValueError where the batch holds no such tokens."""
        tokens = _tokens(batch)
        return chunked_loss(self.head, self.hidden(tokens[:, :-1]), tokens[:, 1:], self.hparams["loss_chunk"])

    def setup(self, stage: str) -> None:
        """Ask the data module for its vocabulary, and refuse one too large; and for the bytes of a token."""
        data = getattr(self.trainer, "datamodule", None)
        needed, given = getattr(data, "vocab_size", None), self.hparams["vocab_size"]
        if needed is not None and needed > given:
            raise SettingError(f"vocab_size must be at least the {needed} of the data's tokenizer, got {given}")
        self.bytes_per_token = getattr(data, "bytes_per_token", None)

    def configure_model(self) -> None:
        """Compile the blocks and the head in place; parameters keep their names."""
        if self.hparams["compile"]:
            for part in [*self.blocks, self.head]:
                # fixed lengths: the sizes of the pyramid follow from N
                part.compile(fullgraph=True, dynamic=False)

    def training_step(self, batch: Mapping[str, Tensor] | Tensor, batch_idx: int) -> Tensor:
        """Return the loss, and show it in the progress bar."""
        loss = self.loss(batch)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor] | Tensor, batch_idx: int) -> None:
        """Log `val/loss` and `val/bits_per_byte`."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor] | Tensor, batch_idx: int) -> None:
        """Log `test/loss` and `test/bits_per_byte`."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Mapping[str, Tensor] | Tensor, stage: str) -> None:
        loss = self.loss(batch)
        num_tokens = _tokens(batch)[:, 1:].numel()
        self.nats_per_token.update(loss, num_tokens)
        self.log(f"{stage}/loss", self.nats_per_token, prog_bar=True)
        if self.bytes_per_token is not None:
            self.bits_per_byte.update(loss / (math.log(2) * self.bytes_per_token), num_tokens)
            self.log(f"{stage}/bits_per_byte", self.bits_per_byte)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with weight decay on the matrices, and the schedule, a step at a time."""
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.hparams["weight_decay"]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        settings = {name: self.hparams[name] for name in ("betas", "eps")}
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["learning_rate"], fused=True, **settings)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says, under bf16-mixed too."""
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None and gradient_clip_val:
            # Lightning refuses a fused optimizer for the sake of float16's loss scale, and bfloat16 has none
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _schedule(self) -> Callable[[int], float]:
        """The factor of the learning rate at each optimizer step, counted from 0."""
        warmup_steps = self.hparams["warmup_steps"]
        if self.hparams["schedule"] == "constant":
            return lambda step: min(1.0, (step + 1) / max(1, warmup_steps))

        total = self.trainer.estimated_stepping_batches
        # -1 for an iterable data set without max_steps
        if not 0 < total < math.inf:
            raise ValueError(
                f"schedule='wsd' needs a known number of steps, the Trainer estimates {total}; "
                "set trainer.max_steps, or schedule='constant'"
            )
        decay_steps = max(1, round(self.hparams["decay_fraction"] * total))
        return lambda step: max(0.0, min(1.0, (step + 1) / max(1, warmup_steps), (total - step) / decay_steps))


def _tokens(batch: Mapping[str, Tensor] | Tensor) -> Tensor:
    if isinstance(batch, Mapping):
        if "tokens" not in batch:
            raise ValueError(f"the batch must hold 'tokens', got {', '.join(map(repr, batch)) or 'nothing'}")
        batch = batch["tokens"]
    if batch.ndim != 2 or batch.shape[1] < 2:
        raise ValueError(f"tokens must be [batch, at least 2 tokens], got {list(batch.shape)}")
    return batch


def _check(name: str, value: Any, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _check_shape(shape: Shape) -> None:
    for field in fields(shape):
        value = getattr(shape, field.name)
        _check(field.name, value, value > 0, "greater than 0")
    if shape.dim % (2 * shape.num_heads):
        raise ValueError(f"dim must be a multiple of 2 * num_heads = {2 * shape.num_heads}, got {shape.dim}")
    if shape.num_heads % shape.num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads = {shape.num_heads}, got {shape.num_kv_heads}")
