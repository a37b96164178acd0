"""One attention layer over a sequence that the GPUs of one host share, and what its exchanges take.

    torchrun --standalone --nproc-per-node 2 experiments/context_layer.py --csv layer.csv

Forward and backward, ms of the slowest rank: dense attention and Lighthouse with heads exchanged for tokens, Lighthouse
with heads exchanged for entries, windows with their edges, each beside the same layer on one GPU alone; then the
exchanges by themselves, with the rate at which a rank sends. Checked first: the output of each form against one GPU's.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_lighthouse import LighthouseConfig, lighthouse_attention
from lightning_lighthouse.attention.sdpa import causal_sdpa
from lightning_lighthouse.attention.windows import window_attention
from lightning_lighthouse.bench.timing import Layer, durations_ms, make_inputs, mark, synchronize
from lightning_lighthouse.context.edges import shared_window
from lightning_lighthouse.context.entries import can_exchange_entries, exchange_entries
from lightning_lighthouse.context.exchange import exchange_tokens, heads_to_tokens, num_neighbours, tokens_to_heads
from lightning_lighthouse.context.group import Context
from lightning_lighthouse.context.queries import exchange_queries, shared_lighthouse

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
WARMUP, CALLS = 3, 10


def slowest(run: Callable[[], object], device: torch.device) -> float:
    """ms of a call among calls behind one another, on the slowest rank."""
    for _ in range(WARMUP):
        run()
    synchronize(device)
    dist.barrier()
    marks = [mark(device)]
    for _ in range(CALLS):
        run()
    marks.append(mark(device))
    taken = torch.tensor(durations_ms(marks)[0] / CALLS, device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def name_of(device: torch.device) -> str:
    """Of the card, or of the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def trace(run: Callable[[], object]) -> str:
    """What takes the device's time in three calls."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        for _ in range(3):
            run()
    return record.key_averages().table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=70)


def both_ways(attend: Attend, qkv: list[Tensor], dout: Tensor) -> Callable[[], object]:
    """Forward and backward of `attend`."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    return lambda: torch.autograd.grad(attend(leaves[0], leaves[1], leaves[2]), leaves, dout)


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[98_304, 262_144], help="N (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv_heads", type=int, help="key/value heads (default: as many)")
    parser.add_argument("--window", type=int, default=512, help="of the windows (default: %(default)s)")
    parser.add_argument("--dense_up_to", type=int, default=262_144, help="longest dense sequence")
    parser.add_argument("--trace", metavar="FORM", help="print what takes the time of this one, by name")
    parser.add_argument("--csv", type=Path, help="where the rows go")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    context = Context.of(dist.distributed_c10d._get_default_group())
    layer = Layer(arguments.heads, arguments.kv_heads or arguments.heads, 128, torch.bfloat16, device)
    rows = []
    for num_tokens in arguments.lengths:
        rows += measure(layer, num_tokens, context, arguments)
    if context.rank == 0 and arguments.csv is not None:
        with arguments.csv.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    dist.destroy_process_group()


def measure(layer: Layer, num_tokens: int, context: Context, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of one length."""
    config = LighthouseConfig()
    # as in routing: with fewer key/value heads than ranks, these share the queries out too
    is_by_heads = num_neighbours(layer.kv_heads, context) == context.size
    q, k, v, whole_dout = make_inputs(layer, num_tokens, seed=0)
    whole = [q, k, v]
    own = slice(context.rank * num_tokens // context.size, (context.rank + 1) * num_tokens // context.size)
    # as a model lays it out, [B, n, H, D]
    part, dout = (
        [x[:, :, own].transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        for tensors in (whole, [whole_dout])
    )

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_sdpa(q, k, v, scale=None, backend="auto")

    def lighthouse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lighthouse_attention(q, k, v, config)

    def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, arguments.window)

    def dense_shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if is_by_heads:
            return exchange_tokens(dense, q, k, v, context)
        return exchange_queries(q, k, v, context, scale=None, sdpa="auto")

    def lighthouse_shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if is_by_heads:
            return exchange_tokens(lighthouse, q, k, v, context)
        return shared_lighthouse(q, k, v, config, context)

    forms: list[tuple[str, Attend, Attend]] = [
        ("lighthouse, tokens", lighthouse, lighthouse_shared),
        ("windows, edges", windows, lambda q, k, v: shared_window(q, k, v, context, arguments.window)),
    ]
    if can_exchange_entries(config, num_tokens // context.size, context):
        forms.append(("lighthouse, entries", lighthouse, lambda q, k, v: exchange_entries(q, k, v, config, context)))
    if num_tokens <= arguments.dense_up_to:
        forms.insert(0, ("dense, tokens", dense, dense_shared))
    rows: list[dict[str, object]] = []
    for name, alone, shared in forms:
        expected = alone(q, k, v)[:, :, own]
        difference = ((shared(part[0], part[1], part[2]) - expected).abs().max() / expected.abs().max()).item()
        one = slowest(both_ways(alone, whole, whole_dout), layer.device)
        both = both_ways(shared, part, dout[0])
        several = slowest(both, layer.device)
        if name == arguments.trace:
            table = trace(both)
            if context.rank == 0:
                print(table, flush=True)
        rows.append({"what": name, "ms_of_one": one, "ms": several, "speedup": one / several, "difference": difference})

    share = config.pyramid(num_tokens).num_gathered // context.size
    exchanges = (("exchange of tokens", num_tokens // context.size), ("exchange of entries", share))
    for name, count in exchanges if is_by_heads else ():
        few = [x[:, :, :count] for x in part]
        heads = tokens_to_heads(few[0], few[1], few[2], context)[0]
        there = slowest(partial(tokens_to_heads, few[0], few[1], few[2], context), layer.device)
        back = slowest(partial(heads_to_tokens, heads, context), layer.device)
        sent = 2 * (layer.heads + layer.kv_heads) * layer.head_dim * 2 * count * (context.size - 1) / context.size
        rows.append(
            {"what": name, "ms": there + back, "mib_sent": sent / 2**20, "gb_per_s": sent / (there + back) / 1e6}
        )
    fields = (
        "what",
        "kv_heads",
        "num_tokens",
        "ranks",
        "ms_of_one",
        "ms",
        "speedup",
        "difference",
        "mib_sent",
        "gb_per_s",
        "device",
    )
    found = {
        "num_tokens": num_tokens,
        "kv_heads": layer.kv_heads,
        "ranks": context.size,
        "device": name_of(layer.device),
    }
    rows = [{field: {**found, **row}.get(field) for field in fields} for row in rows]
    if context.rank == 0:
        for row in rows:
            print({name: value for name, value in row.items() if value is not None}, flush=True)
    return rows


if __name__ == "__main__":
    main()
