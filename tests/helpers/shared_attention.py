"""Attention shared by processes beside that of one: `shared_attention.py FOLDER RANKS quick|all|grouped|triton`.

Every rank writes `FOLDER/<rank>.json`: for each case the largest error of output and gradients relative to the largest
value of one process, and whether all bits are equal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lighthouse import LighthouseConfig, context_parallel, local_positions, patch_attention, slice_tokens
from lightning_lighthouse.attention import windows
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.context.group import current, whole_sequences

HEADS, GROUPS, DIM, WIDTH, BATCH = 8, 4, 4, 16, 2
# no power of two, and no multiple of what windows and tiles have
TOKENS = 516
# whose tiles end with the ranks, so that only entries are exchanged
EVEN = {"tokens": 1024, "config": LighthouseConfig(top_k=128)}
CASES = {
    "dense": {"layer_types": ["dense"]},
    "causal": {"config": LighthouseConfig(top_k=64, num_levels=2)},
    "published": {"config": LighthouseConfig(top_k=40, selection="published", combine="mean")},
    "strided": {"config": LighthouseConfig(top_k=40, selection="strided")},
    "random": {"config": LighthouseConfig(top_k=40, selection="random")},
    "dilated": {"config": LighthouseConfig(top_k=40, scorer="dilated")},
    "window": {"layer_types": ["window"], "window": 37},
    "sinks": {"layer_types": ["window"], "window": 37, "sink_tokens": 5},
    "wide window": {"layer_types": ["window"], "window": 350, "sink_tokens": 2},
    "chunk": {"layer_types": ["chunk"], "window": 100},
    "wide chunk": {"layer_types": ["chunk"], "window": 300},
    "dense, one kv head": {"layer_types": ["dense"], "heads": (3, 1)},
    "dilated, one kv head": {"config": LighthouseConfig(top_k=40, scorer="dilated"), "heads": (3, 1)},
    "wide window, three kv heads": {"layer_types": ["window"], "window": 350, "heads": (6, 3)},
    "entries": EVEN,
    "entries, one kv head": {**EVEN, "heads": (3, 1)},
    "entries, mean, four levels": {
        **EVEN,
        "config": LighthouseConfig(top_k=128, num_levels=4, pooling_factor=2, combine="mean"),
    },
}
# those that take longer, or differ little
MORE = {
    "entries, mean": {**EVEN, "config": LighthouseConfig(top_k=128, combine="mean")},
    "entries, two levels": {**EVEN, "config": LighthouseConfig(top_k=128, num_levels=2)},
    "entries, rotated after": {
        **EVEN,
        "config": LighthouseConfig(top_k=128, rotate="after"),
        "rotary": {"rope_theta": 50.0},
    },
    "entries, published": {"tokens": 2048, "config": LighthouseConfig(top_k=256, selection="published")},
    "entries, random": {"tokens": 2048, "config": LighthouseConfig(top_k=256, selection="random")},
    "entries, strided": {"tokens": 2048, "config": LighthouseConfig(top_k=256, selection="strided")},
}


# the kernels under Triton's slow interpreter: another form of scores and slots
KERNELS = {
    "causal": {"tokens": 512, "config": LighthouseConfig(backend="triton", top_k=64)},
    "mean, four levels": {
        "tokens": 512,
        "config": LighthouseConfig(backend="triton", top_k=64, num_levels=4, pooling_factor=2, combine="mean"),
    },
    "window": {"tokens": 512, "layer_types": ["window"], "window": 61},
    "sinks": {"tokens": 512, "layer_types": ["window"], "window": 37, "sink_tokens": 5},
}


class Attention(nn.Module):
    """One layer with grouped heads, whose keys know their place."""

    def __init__(self, heads: int, groups: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads, groups, groups
        self.qkv = nn.Linear(WIDTH, sum(self.heads) * DIM, dtype=dtype)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, DIM)).transpose(1, 2).split(self.heads, 1)
        angle = positions.double().view(-1, 1) / 10
        k = k * (2 + angle.cos()).to(k.dtype)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o.transpose(1, 2).flatten(2)


def attend(layer: nn.Module, x: Tensor, weights: Tensor, case: dict, step: int = 7) -> list[Tensor]:
    """The output, and the gradients of inputs and weights."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    options = {name: value for name, value in case.items() if name not in ("tokens", "heads")}
    if case.get("layer_types") == ["dense"]:
        out = layer(x, local_positions(x.shape[1]))
        (out * weights).sum().backward()
    else:
        with patch_attention(layer, **options) as patch:
            patch.set_step(step)
            out = layer(x, local_positions(x.shape[1]))
            (out * weights).sum().backward()
    return [out.detach(), x.grad, layer.qkv.weight.grad.clone()]


def blank(layer: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Room for what `attend` returns."""
    return [torch.empty(like.shape, dtype=like.dtype) for like in (weights, x, layer.qkv.weight)]


def work(rank: int, ranks: int, folder: str, cases: dict[str, dict], dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        heads, groups = case.get("heads", (HEADS, GROUPS))
        layer = Attention(heads, groups, dtype)
        tokens = case.get("tokens", TOKENS)
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(BATCH, tokens, WIDTH, generator=draw, dtype=torch.float64)
        # bursts, so that norms differ and scores have something to rank
        x = (x * torch.randn(BATCH, tokens, 1, generator=draw, dtype=torch.float64).exp()).to(dtype)
        weights = torch.randn(BATCH, tokens, heads * DIM, generator=draw, dtype=dtype)
        mine = slice(rank * tokens // ranks, (rank + 1) * tokens // ranks)
        # by one rank, which the others would repeat
        whole = attend(layer, x, weights, case) if rank == 0 else blank(layer, x, weights)
        for tensor in whole:
            dist.broadcast(tensor, 0)
        with context_parallel(dist.group.WORLD) as context:
            shared = attend(layer, x[:, mine], weights[:, mine], case)
            assert current() is context
        assert current() is None
        dist.all_reduce(shared[2])
        wanted = [whole[0][:, mine], whole[1][:, mine], whole[2]]
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(shared, wanted, strict=True)]
        found[name] = {"errors": errors, "same": torch.equal(shared[0], wanted[0])}
    found["refused"] = refusals(ranks)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def refusals(ranks: int) -> dict[str, str]:
    """What is said to calls that cannot be shared; none of them reaches the other ranks."""
    q, k = torch.zeros(1, HEADS, 6, DIM), torch.zeros(1, GROUPS, 6, DIM)
    calls = {
        "mask": lambda: F.scaled_dot_product_attention(q, q, q, torch.ones(6, 6, dtype=torch.bool)),
        "not causal": lambda: F.scaled_dot_product_attention(q, q, q),
        "dropout": lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5, is_causal=True),
        "cache": lambda: F.scaled_dot_product_attention(q[:, :, -1:], k, k, is_causal=True, enable_gqa=True),
        "uneven": lambda: slice_tokens(torch.zeros(1, ranks * 5 + 2)),
    }
    said = {}
    with context_parallel(dist.group.WORLD) as context:
        for name, call in calls.items():
            try:
                call()
            except (RuntimeError, SettingError) as error:
                said[name] = f"{type(error).__name__}: {error}"
        context.num_tokens = 4
        try:
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
        except RuntimeError as error:
            said["length"] = f"{type(error).__name__}: {error}"
        with whole_sequences():
            assert F.scaled_dot_product_attention(q, q, q).shape == q.shape
    return said


if __name__ == "__main__":
    # nothing has run yet that a fork could break, and nobody imports torch again
    if sys.argv[3] == "triton":
        windows._takes_kernel = lambda q, sdpa: True
        HEADS, GROUPS, BATCH = 4, 2, 1
        what = KERNELS, torch.float32
    else:
        if sys.argv[3] == "grouped":
            GROUPS = 2
        what = CASES if sys.argv[3] == "quick" else CASES | MORE, torch.float64
    count, (chosen, floats) = int(sys.argv[2]), what
    chosen = {name: case for name, case in chosen.items() if case.get("tokens", TOKENS) % count == 0}
    mp.start_processes(work, (count, sys.argv[1], chosen, floats), nprocs=count, start_method="fork")
