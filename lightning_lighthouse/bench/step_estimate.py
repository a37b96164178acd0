"""What a training step takes, in seconds and memory, calculated from a model's sizes: before anything trains.

Seconds of a step are those of its products, of attention by the type of each layer, of everything elementwise, and of
the optimizer; memory is what parameters, gradients and optimizer hold, and what a layer keeps of a token for the
backward pass. The constants are in `card_speeds.py`; those of memory were fitted to the peaks of compiled `Decoder`s,
which keep the stream between the blocks in bfloat16: others have it in the dtype of their weights.
"""

# N tokens, S gathered entries

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

from torch import nn

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.layer_types import CHUNK, LIGHTHOUSE, WINDOW
from lightning_lighthouse.bench.card_speeds import CardSpeed
from lightning_lighthouse.model.decoder import Decoder
from lightning_lighthouse.model.flops import (
    AttentionSize,
    attention_flops_per_token,
    attention_size,
    kv_heads,
    num_used_parameters,
    pairs_per_token,
)

GIB = 2**30
# fp32 weights, gradients and both averages of AdamW; read and written once each by the optimizer
PARAMETER_BYTES, OPTIMIZER_BYTES = 16, 36
# where the backward pass begins there are no gradients yet
PARAMETER_BYTES_AT_LOSS = 12
# a layer keeps so many bytes of a token for a unit of the stream's width, of the feed-forward's, and of q, k, v and o
STREAM_BYTES, FEED_FORWARD_BYTES, HEAD_BYTES = 11.4, 6.63, 8.0
# what Lighthouse keeps instead of q, k, v and o, which are short, by what was measured
LIGHTHOUSE_HEAD_BYTES = -0.5
# of attention, forward and backward together, that the forward pass takes: when it is computed again
FORWARD_SHARE = 0.26
# channels of a head that are too few for the tensor cores to be busy
NARROW = 64
# passes over the logits of all tokens, in float32, for the loss and its gradient
LOGIT_PASSES, LOGIT_BYTES = 6, 4
# of a logit whose loss begins the backward pass: in 2 bytes and in float32, its logarithm, and both gradients
LOGIT_BYTES_HELD = 16


class LayerPlan(NamedTuple):
    """How one layer attends in a phase.

    Args:
        layer_type: One of LAYER_TYPES.
        config: Of Lighthouse Attention.
        window: Of "window" and "chunk".
        sink_tokens: Of "window".
    """

    layer_type: str
    config: LighthouseConfig
    window: int | None = None
    sink_tokens: int = 0

    def pairs(self, num_tokens: int) -> float:
        """See `pairs_per_token`."""
        return pairs_per_token(self.layer_type, num_tokens, self.config, self.window, self.sink_tokens)


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that its step follows from.

    Args:
        num_parameters: All that are trained.
        used_parameters: Those that a token is multiplied with.
        width: Of the stream.
        feed_forward: Of a layer's inner products.
        vocabulary: Rows of its largest product of the head.
        stream_bytes: Of a number in the stream.
        attention: Of each layer.
        heads: Query and key/value heads of each layer; None where it does not say them.
    """

    num_parameters: int
    used_parameters: float
    width: int
    feed_forward: int
    vocabulary: int
    stream_bytes: int
    attention: tuple[AttentionSize, ...]
    heads: tuple[tuple[int, int] | None, ...]


def model_size(model: nn.Module, layers: Sequence[nn.Module]) -> ModelSize:
    """Read the sizes of a model, which may be on the meta device.

    Args:
        model: Holds all that is trained.
        layers: Its attention modules.

    Raises:
        ValueError: A layer does not say its heads.
    """
    sizes = [attention_size(layer) for layer in layers]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or not known:
        raise ValueError(f"{len(sizes) - len(known)} of {len(sizes)} attention layers do not say how wide they are")
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    # under autocast the sum of what blocks return stays in the dtype of the embedding, unless the model casts it
    stream = 2 if isinstance(model, Decoder) else max((table.weight.element_size() for table in tables), default=2)
    # what takes the widest input leads from the feed-forward back into the stream
    widest = max(linears, key=lambda linear: linear.in_features, default=None)
    return ModelSize(
        num_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        used_parameters=num_used_parameters(model),
        width=widest.out_features if widest is not None else known[0].qk_width,
        feed_forward=widest.in_features if widest is not None else known[0].qk_width,
        vocabulary=max((table.num_embeddings for table in tables), default=0),
        stream_bytes=stream,
        attention=tuple(known),
        heads=tuple(kv_heads(layer) for layer in layers),
    )


class StepEstimate(NamedTuple):
    """Of one optimizer step.

    Args:
        flops: By part.
        seconds: By part; of the GPU. {} where the card is not known.
        launch_seconds: Of the CPU, which the step takes at least.
        memory_gib: At most.
    """

    flops: dict[str, float]
    seconds: dict[str, float]
    launch_seconds: float
    memory_gib: float

    @property
    def step_seconds(self) -> float | None:
        """Of the whole step."""
        return max(sum(self.seconds.values()), self.launch_seconds) if self.seconds else None


def estimate_step(
    size: ModelSize,
    layers: Sequence[LayerPlan],
    num_tokens: int,
    batch_size: int,
    speed: CardSpeed | None,
    *,
    accumulated: int = 1,
    recomputes: bool = False,
    shards: int = 1,
    sharers: int = 1,
    loss_chunk: int = 0,
) -> StepEstimate:
    """Calculate a step of one phase on one GPU.

    Args:
        size: Of the model.
        layers: How each attends.
        num_tokens: N, of a sequence.
        batch_size: Sequences in memory at a time.
        speed: Of the card; None: no seconds.
        accumulated: Batches of a step.
        recomputes: Whether blocks are computed again in the backward pass.
        shards: Ranks that parameters, gradients and optimizer are spread over.
        sharers: Ranks that share each sequence: its tokens, and within attention its heads, or heads and queries.
        loss_chunk: Tokens whose logits are in memory at a time; 0: hardly any, by a fused loss.
    """
    tokens = num_tokens * batch_size * accumulated / sharers
    again = 4 / 3 if recomputes else 1.0
    head = size.vocabulary * size.width
    flops = {
        "blocks": 6 * max(0.0, size.used_parameters - head) * tokens * again,
        "head": 6 * head * tokens,
        "attention": sum(
            attention_flops_per_token([one], [layer.pairs(num_tokens)]) * tokens
            for one, layer in zip(size.attention, layers, strict=True)
        )
        * (again if recomputes else 1.0),
    }
    seconds = {}
    if speed is not None:
        attention = sum(
            _attention_seconds(one, heads, layer, num_tokens, speed)
            for one, heads, layer in zip(size.attention, size.heads, layers, strict=True)
        )
        seconds = {
            "products": (flops["blocks"] + flops["head"]) / speed.products,
            "attention": attention * batch_size * accumulated / sharers * (1 + FORWARD_SHARE * recomputes),
            "elementwise": tokens
            * len(layers)
            * size.feed_forward
            * speed.elementwise
            * again
            * (speed.wide_stream if size.stream_bytes > 2 else 1.0)
            + tokens * size.vocabulary * LOGIT_BYTES * LOGIT_PASSES / speed.copied,
            "optimizer": OPTIMIZER_BYTES * size.num_parameters / shards / speed.copied,
        }
    launch = 0.0
    if speed is not None:
        routed = sum(layer.layer_type == LIGHTHOUSE for layer in layers)
        launch = accumulated * (len(layers) * speed.launch + routed * speed.launch_stages)
    more = [
        batch_size * _more_kv_bytes(one, heads, layer, num_tokens, sharers)
        for one, heads, layer in zip(size.attention, size.heads, layers, strict=True)
    ]
    held = num_tokens * batch_size / sharers
    memory = _memory_gib(size, layers, held, recomputes, shards, loss_chunk)
    memory += (max(more) if recomputes else sum(more)) / GIB
    return StepEstimate(flops, seconds, launch, memory)


def _attention_seconds(
    size: AttentionSize, heads: tuple[int, int] | None, layer: LayerPlan, num_tokens: int, speed: CardSpeed
) -> float:
    """Of one layer and sequence, forward and backward."""
    slower = speed.narrow if heads is not None and size.qk_width <= NARROW * heads[0] else 1.0
    if size.own_window is not None and size.own_window < num_tokens:
        return num_tokens * size.qk_width * (speed.window_token + speed.window_pair * size.own_window)
    if layer.layer_type == WINDOW and layer.window is not None:
        seen = min(layer.window + layer.sink_tokens, num_tokens)
        return num_tokens * size.qk_width * (speed.window_token + speed.window_pair * seen)
    if layer.layer_type == CHUNK and layer.window is not None:
        each = speed.chunk_token + speed.chunk_pair * min(layer.window, num_tokens)
        return num_tokens * size.qk_width * each * slower
    pairs = layer.pairs(num_tokens)
    attend = attention_flops_per_token([size], [pairs]) * num_tokens / speed.attention * slower
    shape = layer.config.pyramid(num_tokens)
    if layer.layer_type != LIGHTHOUSE or not shape.compresses:
        return attend
    # every row of q, k, v and o once in each direction, in 2 bytes
    moved = 4 * (size.qk_width + size.v_width) * 2 * (num_tokens + shape.num_gathered)
    return attend + speed.stage_seconds + moved / (speed.stage_share * speed.copied)


def _more_kv_bytes(
    size: AttentionSize, heads: tuple[int, int] | None, layer: LayerPlan, num_tokens: int, sharers: int
) -> float:
    """Keys and values that a rank keeps of a sequence beyond its share, where ranks cannot share the heads out.

    Then u = gcd(W, G) ranks share them, and each keeps G / u heads of all tokens, or entries.
    """
    is_local = layer.layer_type in (WINDOW, CHUNK) or size.own_window is not None
    if heads is None or is_local:
        return 0.0
    num_heads, num_kv_heads = heads
    neighbours = gcd(sharers, num_kv_heads)
    shape = layer.config.pyramid(num_tokens)
    rows = shape.num_gathered if layer.layer_type == LIGHTHOUSE and shape.compresses else num_tokens
    # in 2 bytes
    all_of_it = 2 * (size.qk_width + size.v_width) * num_kv_heads / num_heads * rows
    return all_of_it * (1 / neighbours - 1 / sharers)


def _memory_gib(
    size: ModelSize, layers: Sequence[LayerPlan], tokens: float, recomputes: bool, shards: int, loss_chunk: int
) -> float:
    """The peak: what is held all along, and what the backward pass needs of `tokens` tokens, in a block or the loss."""
    # of the stream a layer keeps two states, and of a recomputed one its input
    wide = size.stream_bytes - 2
    kept = [
        (STREAM_BYTES + 2 * wide) * size.width
        + FEED_FORWARD_BYTES * size.feed_forward
        + (LIGHTHOUSE_HEAD_BYTES if layer.layer_type == LIGHTHOUSE else HEAD_BYTES) * one.qk_width
        for one, layer in zip(size.attention, layers, strict=True)
    ]
    activations = size.stream_bytes * size.width * len(kept) if recomputes else sum(kept)
    parameters = size.num_parameters / shards
    # one of the recomputed blocks keeps the rest
    in_block = PARAMETER_BYTES * parameters + (activations + max(kept) * recomputes) * tokens
    logits = LOGIT_BYTES_HELD * size.vocabulary * min(loss_chunk, tokens)
    in_loss = PARAMETER_BYTES_AT_LOSS * parameters + activations * tokens + logits
    return max(in_block, in_loss) / GIB
