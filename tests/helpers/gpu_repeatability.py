"""Does attention repeat bit for bit on this GPU, and what does a repeatable backend cost?

A developer's script, not a test, for it asserts nothing: `python tests/helpers/gpu_repeatability.py`. It runs SDPA's
backends and the whole layer several times on the same inputs, forward and backward, and compares bits; then it times
cuDNN and flash in turns. The results are in docs/numbers/benchmarks.md. Times of the layer itself: `lighthouse bench`.
"""

# S tokens or gathered entries

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_lighthouse import LighthouseConfig, lighthouse_attention
from lightning_lighthouse.attention.sdpa import causal_sdpa
from lightning_lighthouse.bench.timing import Layer, issued_ms, make_inputs

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
NAMES = ("output", "dq", "dk", "dv")


def backend(name: str) -> Attend:
    return lambda q, k, v: causal_sdpa(q, k, v, scale=None, backend=name)


def lighthouse(top_k: int) -> Attend:
    config = LighthouseConfig(top_k=top_k, selection="published")
    return lambda q, k, v: lighthouse_attention(q, k, v, config)


def forward_backward(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def timed_run(attend: Attend, inputs: list[Tensor], turn: int) -> None:
    forward_backward(attend, inputs)


def as_bytes(x: Tensor) -> Tensor:
    """`[..., bytes of a value]`, so that a NaN equals itself and -0 is not 0."""
    return x.contiguous().view(torch.uint8).unflatten(-1, (-1, x.dtype.itemsize))


def differences(attend: Attend, inputs: list[Tensor], runs: int) -> str:
    """Which results differ from those of the first run, in how many values at most and by how much at most."""
    first = forward_backward(attend, inputs)
    most = dict.fromkeys(NAMES, 0)
    largest = dict.fromkeys(NAMES, 0.0)
    for _ in range(runs - 1):
        for name, a, b in zip(NAMES, first, forward_backward(attend, inputs), strict=True):
            most[name] = max(most[name], int((as_bytes(a) != as_bytes(b)).any(-1).sum()))
            largest[name] = max(largest[name], float((a.float() - b.float()).abs().max() / a.float().abs().max()))
    told = [
        f"{name} differs in {most[name]:,} of {x.numel():,} values, by up to {largest[name]:.1e} of the largest"
        for name, x in zip(NAMES, first, strict=True)
        if most[name]
    ]
    return "; ".join(told) or "bit for bit the same"


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[10_240, 18_432, 32_768, 65_536], help="of SDPA")
    parser.add_argument("--layers", nargs="+", default=["32768:1024", "98304:1536"], help="tokens:top_k")
    parser.add_argument("--timed", type=int, nargs="+", default=[18_432, 98_304], help="lengths to time")
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = Layer(heads=8, kv_heads=8, head_dim=128, dtype=dtype, device=device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {asked.runs} runs of each, {dtype}"
    )

    for num_tokens in asked.lengths:
        inputs = make_inputs(layer, num_tokens, seed=42)
        for sdpa in ("cudnn", "flash"):
            print(f"SDPA {num_tokens:>7,} {sdpa:>6}: {differences(backend(sdpa), inputs, asked.runs)}", flush=True)
        with deterministic(True):
            told = differences(backend("auto"), inputs, asked.runs)
            print(f"SDPA {num_tokens:>7,} auto, deterministic mode: {told}", flush=True)
    for row in asked.layers:
        num_tokens, top_k = map(int, row.split(":"))
        inputs = make_inputs(layer, num_tokens, seed=42)
        for on in (False, True):
            with deterministic(on):
                told = differences(lighthouse(top_k), inputs, asked.runs)
            print(f"layer {num_tokens:>7,} k {top_k} {'deterministic' if on else 'default'} mode: {told}", flush=True)
    for num_tokens in asked.timed:
        inputs = make_inputs(layer, num_tokens, seed=42)
        runs = [partial(timed_run, backend(sdpa), inputs) for sdpa in ("cudnn", "flash")]
        cudnn, flash = issued_ms(runs, device, asked.runs)
        ratio = f"{flash / cudnn:.2f} times"
        print(f"forward + backward {num_tokens:>7,}: cudnn {cudnn:.3f} ms, flash {flash:.3f} ms, {ratio}", flush=True)


if __name__ == "__main__":
    main()
