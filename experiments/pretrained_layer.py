"""What in a Lighthouse layer throws a pretrained model off: each part changed alone, without any training.

    python experiments/pretrained_layer.py SmolLM2-135M-Instruct.Q4_1.gguf books-val.jsonl.gz found.csv [NAME ...]

Three layers of SmolLM2 in four get windows of 512 tokens with 4 sinks, the fourth what a line of `VARIANTS` says; a
name with "all:" in front routes every layer. One sequence of 8,192 tokens of a book, whose last 128 repeat those 2,048
before them; float32 on a CPU, by plain PyTorch. Losses are in nats a token. What was found is in docs/log.md.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from lightning_lighthouse import LighthouseConfig
from lightning_lighthouse.attention import reference

NUM_TOKENS, PASSAGE, DISTANCE = 8_192, 128, 2_048
WINDOW, SINKS = 512, 4
# queries at a time
CHUNK = 512
SKIPPED_CHARACTERS = 100_000


class Parts(NamedTuple):
    """What a token may attend to, seen from all tokens: outputs and the logarithms of their weights.

    Args:
        out: `[parts, H, N, D]`.
        lse: `[parts, H, N]`, -inf where there is none.
    """

    out: Tensor
    lse: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Callable[[Tensor, Tensor], Tensor], bias: Tensor | None = None):
    """Attention with the logarithm of its denominator: `[H, Q, D]` and `[H, Q]`; `sees(query, key)` is a mask."""
    outs, lses = [], []
    keys = torch.arange(k.shape[1])
    for start in range(0, q.shape[1], CHUNK):
        queries = torch.arange(start, min(start + CHUNK, q.shape[1]))
        logits = q[:, queries] @ k.mT * q.shape[-1] ** -0.5
        if bias is not None:
            logits = logits + bias[:, None, :]
        logits = logits.masked_fill(~sees(queries[:, None], keys[None]), -torch.inf)
        lses.append(logits.logsumexp(-1))
        outs.append((logits - lses[-1].clamp(min=-1e30)[..., None]).exp() @ v)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def window_part(q: Tensor, k: Tensor, v: Tensor, window: int = WINDOW, sinks: int = SINKS) -> tuple[Tensor, Tensor]:
    """A token's own query on the tokens before it: as `attend`, by the keys that some query of a chunk sees."""
    outs, lses = [], []
    for start in range(0, q.shape[1], CHUNK):
        first = max(0, start - window)
        seen = torch.arange(first, start + CHUNK)
        seen = torch.cat([torch.arange(min(sinks, first)), seen])
        sees = partial(_in_window, torch.arange(start, start + CHUNK), seen, window, sinks)
        out, lse = attend(q[:, start : start + CHUNK], k[:, seen], v[:, seen], sees)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _in_window(queries: Tensor, keys: Tensor, window: int, sinks: int, query: Tensor, key: Tensor) -> Tensor:
    i, j = queries[query], keys[key]
    return (j <= i) & ((j > i - window) | (j < sinks))


def pooled(x: Tensor, shape: Any, rotation: tuple[Tensor, Tensor] | None = None, norm: str = "mean") -> Tensor:
    """All entries, `[H, M, D]`; with a rotation those of the last token; with norm "kept" as long as their tokens."""
    if rotation is None:
        levels = [x.unflatten(1, (-1, shape.window(level))) for level in range(shape.num_levels)]
        means = [level.mean(2) for level in levels]
    else:
        cos, sin = rotation
        plain = rotate(x, cos, -sin)
        means = []
        for level in range(shape.num_levels):
            p = shape.window(level)
            means.append(rotate(plain.unflatten(1, (-1, p)).mean(2), cos[p - 1 :: p], sin[p - 1 :: p]))
        levels = [x.unflatten(1, (-1, shape.window(level))) for level in range(shape.num_levels)]
    if norm == "kept":
        means = [
            mean * level.norm(dim=-1).mean(2, keepdim=True) / mean.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            for mean, level in zip(means, levels, strict=True)
        ]
    return torch.cat(means, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By halves, as Llama pairs them."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Layer(NamedTuple):
    """A way to attend.

    Args:
        top_k: Winners.
        selection: As in `LighthouseConfig`.
        combine: "sum", "mean", or "lse": levels weigh as much as attention to their keys did.
        counts: Add the logarithm of an entry's tokens to its logit.
        norm: "kept": pooled q and k are as long as their tokens are.
        keys_norm: The same of k alone.
        rotate_after: Pool what is not rotated.
        own: Queries of each token on the gathered entries, instead of pooled ones.
        shift: Whether a token gets no summary that contains later tokens; without it the layer is not causal.
        window: Tokens of a window branch with sinks; 0 for none, below 0 for nothing but it.
        merge: How the branch and Lighthouse meet: "lse", "mean", or "missing": the window where no query of the
            token's own is gathered.
    """

    top_k: int = 128
    selection: str = "causal"
    combine: str = "mean"
    counts: bool = False
    norm: str = "mean"
    keys_norm: str = "mean"
    rotate_after: bool = False
    own: bool = False
    shift: bool = True
    window: int = 0
    merge: str = "lse"


def merged(parts: Parts) -> tuple[Tensor, Tensor]:
    """By log-sum-exp."""
    lse = parts.lse.logsumexp(0)
    weights = (parts.lse - lse.clamp(min=-1e30)).exp()
    return (weights[..., None] * parts.out).sum(0), lse


def lighthouse(q: Tensor, k: Tensor, v: Tensor, layer: Layer, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """`[H, N, D]`, of q, k and v with as many heads."""
    config = LighthouseConfig(top_k=layer.top_k, selection=layer.selection)  # type: ignore[arg-type]
    shape = config.pyramid(q.shape[1])
    assert shape.padded_tokens == q.shape[1]
    selection = reference.select(reference.score(q[None], k[None], v[None], shape, config), shape, config)
    index, slots = selection.index[0].long(), selection.slots[0]
    kind = rotation if layer.rotate_after else None
    queries = pooled(q, shape, kind, layer.norm)
    keys = pooled(k, shape, kind, layer.keys_norm)
    values = pooled(v, shape)
    sizes = torch.cat([torch.full((shape.entries(level),), shape.window(level)) for level in range(shape.num_levels)])
    lasts = torch.cat(
        [(torch.arange(shape.entries(level)) + 1) * shape.window(level) - 1 for level in range(shape.num_levels)]
    )
    qs, ks, vs = (x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])) for x in (queries, keys, values))
    bias = sizes.float().log()[index] if layer.counts else None
    if layer.own:
        # a token sees the entries that end at or before it; its own key where nothing else of it is gathered
        last = lasts[index]
        outs = [
            attend(
                q[h : h + 1],
                ks[h : h + 1],
                vs[h : h + 1],
                partial(ends_before, last[h]),
                None if bias is None else bias[h : h + 1],
            )
            for h in range(q.shape[0])
        ]
        far = torch.cat([o for o, _ in outs]), torch.cat([lse for _, lse in outs])
        own = v, (q * k).sum(-1) * q.shape[-1] ** -0.5
        is_gathered = slots[:, : q.shape[1]] >= 0
        parts = Parts(torch.stack([far[0], own[0]]), torch.stack([far[1], own[1].masked_fill(is_gathered, -torch.inf)]))
        out, out_lse = merged(parts)
        present = torch.ones_like(out_lse, dtype=torch.bool)
    else:
        o, lse = attend(qs, ks, vs, lambda i, j: j <= i, bias)
        tokens = torch.arange(q.shape[1])
        rows, weights = [], []
        for level in range(shape.num_levels):
            p = shape.window(level)
            entry = torch.div(tokens - p + 1, p, rounding_mode="floor") if layer.shift else tokens // p
            slot = slots[:, shape.start(level) + entry.clamp(min=0)].masked_fill(entry < 0, -1).long()
            rows.append(o.gather(1, slot.clamp(min=0)[..., None].expand(-1, -1, o.shape[-1])))
            weights.append(lse.gather(1, slot.clamp(min=0)).masked_fill(slot < 0, -torch.inf))
        parts = Parts(torch.stack(rows), torch.stack(weights))
        out, out_lse = merged(parts)
        present = parts.lse[0] > -torch.inf
        is_there = (parts.lse > -torch.inf)[..., None]
        if layer.combine != "lse":
            out = (parts.out * is_there).sum(0)
            if layer.combine == "mean":
                out = out / is_there.sum(0).clamp(min=1)
    if not layer.window:
        return out
    near, near_lse = window_part(q, k, v, layer.window)
    if layer.merge == "missing":
        return torch.where(present[..., None], out, near)
    if layer.merge == "mean":
        return (out + near) / 2
    return merged(Parts(torch.stack([out, near]), torch.stack([out_lse, near_lse])))[0]


def ends_before(last: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether a gathered entry ends at or before a token."""
    return last[key] <= query


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


VARIANTS: dict[str, Layer | str] = {
    "dense": "dense",
    "window": "window",
    "sum": Layer(combine="sum"),
    "mean": Layer(),
    "lse": Layer(combine="lse"),
    "mean, k 512": Layer(top_k=512),
    "mean, published": Layer(selection="published"),
    "mean, counts": Layer(counts=True),
    "lse, counts": Layer(combine="lse", counts=True),
    "mean, norms kept": Layer(norm="kept", keys_norm="kept"),
    "mean, norms of q kept": Layer(norm="kept"),
    "mean, rotated after": Layer(rotate_after=True),
    "mean, rotated after, norms kept": Layer(rotate_after=True, norm="kept", keys_norm="kept"),
    "mean, unshifted (not causal)": Layer(shift=False),
    "own queries": Layer(own=True),
    "own queries, counts": Layer(own=True, counts=True),
    "mean + window 128 by lse": Layer(window=128),
    "lse + window 128 by lse": Layer(combine="lse", window=128),
    "lse, counts + window 128 by lse": Layer(combine="lse", counts=True, window=128),
    "mean + window 128 by mean": Layer(window=128, merge="mean"),
    "mean + window 128 where missing": Layer(window=128, merge="missing"),
    "lse, rotated after + window 128 by lse": Layer(combine="lse", rotate_after=True, window=128),
    "lse + window 512 by lse": Layer(combine="lse", window=512),
    "window 128": Layer(window=-128),
    "all: window 128": Layer(window=-128),
    "all: mean": Layer(),
    "all: lse + window 128 by lse": Layer(combine="lse", window=128),
}


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, variant: str, rotation: Any, **_: Any
) -> tuple[Tensor, None]:
    """The attention function of transformers: `[1, H, N, D]` to `[1, N, H, D]`."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = query[0], *(x[0].repeat_interleave(groups, 0) for x in (key, value))
    layer = VARIANTS[variant]
    if not variant.startswith("all:") and module.layer_idx % 4 != 3:
        out = window_part(q, k, v)[0]
    elif layer == "dense":
        out = dense(q, k, v)
    elif layer == "window":
        out = window_part(q, k, v)[0]
    elif isinstance(layer, Layer) and layer.window < 0:
        out = window_part(q, k, v, -layer.window)[0]
    else:
        assert isinstance(layer, Layer)
        out = lighthouse(q, k, v, layer, rotation)
    return out.transpose(0, 1)[None], None


def main(model_file: Path, text_file: Path, output: Path, names: list[str]) -> None:
    """Measure the variants, and add a row each to the CSV."""
    settings = {"gguf_file": model_file.name}
    model = AutoModelForCausalLM.from_pretrained(model_file.parent, dtype=torch.float32, **settings).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_file.parent, **settings)
    with gzip.open(text_file, "rt") as lines:
        text = json.loads(next(lines))["text"][SKIPPED_CHARACTERS:]
    tokens = torch.tensor(tokenizer(text[: NUM_TOKENS * 8]).input_ids[: NUM_TOKENS + 1])
    tokens[-PASSAGE:] = tokens[-PASSAGE - DISTANCE : -DISTANCE].clone()
    positions = torch.arange(NUM_TOKENS)[None]
    cos, sin = (x[0] for x in model.model.rotary_emb(torch.zeros(1, NUM_TOKENS, 1), positions))
    for name in names or VARIANTS:
        AttentionInterface.register("variant", partial(attention, variant=name, rotation=(cos, sin)))
        model.set_attn_implementation("variant")
        begin = time.monotonic()
        with torch.no_grad():
            hidden = model.model(tokens[None, :-1]).last_hidden_state[0]
            losses = torch.cat(
                [
                    F.cross_entropy(model.lm_head(part), targets, reduction="none")
                    for part, targets in zip(hidden.split(1024), tokens[1:].split(1024), strict=True)
                ]
            )
        row = {
            "variant": name,
            "loss": losses[:-PASSAGE].mean().item(),
            "loss_4096_up": losses[4096:-PASSAGE].mean().item(),
            "copy_first": losses[-PASSAGE - DISTANCE : -DISTANCE].mean().item(),
            "copy_2048": losses[-PASSAGE:].mean().item(),
            "seconds": time.monotonic() - begin,
        }
        print(" ".join(f"{value:.3f}" if isinstance(value, float) else value.ljust(44) for value in row.values()))
        sys.stdout.flush()
        is_new = not output.exists()
        with output.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
