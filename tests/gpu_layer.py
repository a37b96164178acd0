"""One Lighthouse layer on a GPU: correct first, then timed against dense attention and the hardware's floor.

A developer's script, not a test: `python tests/gpu_layer.py [--rows 32768:3:1024 ...]`. The floor is attention on the
gathered entries alone, plus 8 rows of N and 8 rows of S values, moved at the copy bandwidth measured in the same run.
"""

# B batch, H heads, N tokens, D head dim, S gathered entries

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_lighthouse import kernels, lighthouse_attention, reference
from lightning_lighthouse.config import LighthouseConfig, PyramidShape
from lightning_lighthouse.kernels.ops import pack
from lightning_lighthouse.sdpa import causal_sdpa

HEADS, DIM = 8, 128
# tokens, levels, top_k; pooling factor 4
ROWS = [
    (32_768, 3, 1024),
    (65_536, 3, 1024),
    (98_304, 3, 1536),
    (131_072, 3, 1024),
    (262_144, 3, 1024),
    (262_144, 3, 2048),
    (524_288, 3, 1024),
    (524_288, 3, 4096),
    (1_048_576, 4, 4096),
]
# above this a dense forward and backward takes minutes
DENSE_TOKENS = 262_144


def median_ms(call: Callable[[], object], budget_ms: float = 300.0) -> float:
    """Median time of one call on the device, among calls issued ahead of it as training issues them."""

    def times(runs: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
        for mark in marks[:-1]:
            mark.record()
            call()
        marks[-1].record()
        torch.cuda.synchronize()
        return sorted(start.elapsed_time(end) for start, end in pairwise(marks))

    warm = times(5)[2]
    runs = max(5, min(100, int(budget_ms / max(warm, 0.01))))
    return times(runs)[runs // 2]


def kernel_ms(call: Callable[[], object]) -> float:
    """Median time of one call without the CPU's part of it: replays of a graph of ten."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    return median_ms(graph.replay, 100.0) / 10


def copy_bandwidth() -> float:
    """Bytes a millisecond, read and written, of a device-to-device copy."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source))


def inputs(tokens: int, heads_inner: bool = True, seed: int = 42) -> list[Tensor]:
    """q, k and v as a model hands them over, and the gradient of the output; bf16."""
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (1, tokens, HEADS, DIM) if heads_inner else (1, HEADS, tokens, DIM)
    tensors = [torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)]
    return [(x.transpose(1, 2) if heads_inner else x).requires_grad_(i < 3) for i, x in enumerate(tensors)]


def forward_backward(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    call(q, k, v).backward(dout)
    q.grad = k.grad = v.grad = None


def errors(tokens: int, config: LighthouseConfig) -> dict[str, tuple[float, float]]:
    """Relative errors against float64 on one selection: of the kernels, and of the reference in the same precision."""
    q, k, v, dout = inputs(tokens)
    shape = config.pyramid(tokens)
    with torch.no_grad():
        selected = kernels.select(kernels.score(q, k, v, shape, config), shape, config)
        slots = torch.full((1, HEADS, shape.num_entries), -1, dtype=torch.int32, device="cuda")
        places = torch.arange(shape.num_gathered, dtype=torch.int32, device="cuda").expand_as(selected.index)
        slots.scatter_(-1, selected.index.long(), places)
        selection = reference.Selection(selected.index, slots)

    def run(stages: object, choice: object, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        gathered = stages.gather(*leaves, choice, shape)
        # the sum of the three stands for attention: the stages alone are compared
        out = stages.scatter(gathered[0] + gathered[1] + gathered[2], choice, shape, config)
        out.backward(dout.to(dtype))
        return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *(x.grad for x in leaves)), strict=True))

    exact = run(reference, selection, torch.float64)
    ours, theirs = run(kernels, selected, torch.bfloat16), run(reference, selection, torch.bfloat16)
    distance = lambda x, name: float((x[name].double() - exact[name]).norm() / exact[name].norm())  # noqa: E731
    return {name: (distance(ours, name), distance(theirs, name)) for name in exact}


def check(tokens: int, config: LighthouseConfig) -> None:
    shape = config.pyramid(tokens)
    q, k, v, dout = inputs(tokens)
    with torch.no_grad():
        scores = kernels.score(q, k, v, shape, config)
        index = kernels.select(scores, shape, config).index
        levels = [shape.entries(level) for level in range(1, shape.num_levels)]
        nothing = torch.zeros(1, HEADS, shape.entries(0), device="cuda")
        pairs = [(nothing, nothing), *zip(scores[0].split(levels, -1), scores[1].split(levels, -1), strict=True)]
        assert torch.equal(index, reference.select(pairs, shape, config).index), "the index differs from the reference"
    for name, (ours, theirs) in errors(tokens, config).items():
        assert ours <= 2 * theirs + 2**-9, f"{name}: error {ours:.2e}, the reference's own {theirs:.2e}"

    results = []
    for _ in range(2):
        out = lighthouse_attention(q, k, v, config)
        results.append((out.detach(), *torch.autograd.grad(kernels_only(q, k, v, config), (q, k, v), dout)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "two runs differ"


def kernels_only(q: Tensor, k: Tensor, v: Tensor, config: LighthouseConfig) -> Tensor:
    """The layer without attention, whose gradient in cuDNN is not repeatable."""
    shape = config.pyramid(q.shape[2])
    with torch.no_grad():
        selection = kernels.select(kernels.score(q, k, v, shape, config), shape, config)
    gathered = kernels.gather(q, k, v, selection, shape)
    return kernels.scatter(gathered[0] + gathered[1] + gathered[2], selection, shape, config)


def stage_times(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, shape: PyramidShape, config: LighthouseConfig) -> str:
    with torch.no_grad():
        scores = kernels.score(q, k, v, shape, config)
        selection = kernels.select(scores, shape, config)
        qs, ks, vs = kernels.gather(q, k, v, selection, shape)
        sizes = pack(shape)
        ops = torch.ops.lightning_lighthouse
        stages = {
            "score": lambda: kernels.score(q, k, v, shape, config),
            "select": lambda: kernels.select(scores, shape, config),
            "gather": lambda: kernels.gather(q, k, v, selection, shape),
            "scatter": lambda: kernels.scatter(qs, selection, shape, config),
            "scatter'": lambda: ops.scatter_backward(dout, selection.slots, sizes, False),
            "gather'": lambda: [ops.gather_backward(x, selection.slots, sizes, True) for x in (qs, ks, vs)],
        }
        return " ".join(f"{name} {kernel_ms(stage) * 1000:.0f}" for name, stage in stages.items()) + " us"


def measure(tokens: int, levels: int, top_k: int, bandwidth: float) -> None:
    config = LighthouseConfig(num_levels=levels, pooling_factor=4, top_k=top_k)
    shape = config.pyramid(tokens)
    q, k, v, dout = inputs(tokens)
    qs, ks, vs, dos = inputs(shape.num_gathered, seed=43)
    attention = lambda q, k, v: causal_sdpa(q, k, v, scale=None, backend="auto")  # noqa: E731
    layer = lambda q, k, v: lighthouse_attention(q, k, v, config)  # noqa: E731

    dense = float("nan")
    if tokens <= DENSE_TOKENS:
        dense = median_ms(lambda: forward_backward(attention, q, k, v, dout))
    alone = median_ms(lambda: forward_backward(attention, qs, ks, vs, dos))
    floor = alone + 8 * (tokens + shape.num_gathered) * HEADS * DIM * 2 / bandwidth

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward_backward(layer, q, k, v, dout)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    ours = median_ms(lambda: forward_backward(layer, q, k, v, dout))
    with torch.no_grad():
        forward = median_ms(lambda: layer(q, k, v))
    print(
        f"N {tokens:>9,} k {top_k} S {shape.num_gathered:>6,} | dense {dense:8.2f} | attention alone {alone:7.3f}, "
        f"floor {floor:7.3f}, ours {ours:7.3f} ({forward:.3f}) ms | {ours / floor:.3f} of the floor, "
        f"{dense / ours:.1f} times dense | peak {peak:.0f} MiB",
        flush=True,
    )
    print("   ", stage_times(q, k, v, dout, shape, config), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", nargs="*", default=[":".join(map(str, row)) for row in ROWS], help="tokens:levels:top_k"
    )
    parser.add_argument("--no-check", action="store_true", help="time only")
    arguments = parser.parse_args()
    rows = [tuple(map(int, row.split(":"))) for row in arguments.rows]
    if not arguments.no_check:
        for tokens, levels, top_k in [(32_768, 3, 1024), (20_011, 4, 300), (70_001, 2, 64)]:
            check(tokens, LighthouseConfig(num_levels=levels, top_k=top_k))
        print("correct", flush=True)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e9:.2f} TB/s", flush=True)
    for row in rows:
        measure(*row, bandwidth)


if __name__ == "__main__":
    main()
