"""What a Lighthouse layer launches, how long the CPU takes to do so, and whether CUDA graphs take that away.

    python experiments/launches.py --lengths 16384 32768 --csv launches.csv

For each length and budget, forward and backward of one layer: kernels that the GPU runs and their time on it, the CPU's
time to issue them, the time of a call among calls issued behind one another, eager, captured by `torch.cuda.graph`, and
compiled with `mode="reduce-overhead"`; dense attention in the same run. Both ways of capturing are checked against the
eager call first, on inputs that were drawn after the capture. `--trace` prints the operations that the CPU spends most
time on, and the kernels that the GPU does; `--host` the functions of Python, whose times include what they call below
Python. Needs a GPU.
"""

from __future__ import annotations

import argparse
import cProfile
import csv
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_lighthouse import LighthouseConfig, lighthouse_attention
from lightning_lighthouse.attention.sdpa import causal_sdpa
from lightning_lighthouse.bench.timing import Layer, issued_ms, make_inputs

WARMUP, CALLS = 5, 50
DEVICE = torch.device("cuda")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Pass:
    """Forward and backward of one layer over inputs that stay where they are, as a CUDA graph needs them.

    Args:
        attend: q, k and v to the output.
        layer: Sizes.
        num_tokens: N.
    """

    def __init__(self, attend: Attend, layer: Layer, num_tokens: int) -> None:
        self.attend = attend
        *qkv, self.dout = make_inputs(layer, num_tokens, seed=0)
        self.qkv = [x.detach().requires_grad_() for x in qkv]

    def __call__(self, turn: int = 0) -> list[Tensor]:
        """The output, and the gradients of q, k and v."""
        out = self.attend(*self.qkv)
        return [out, *torch.autograd.grad(out, self.qkv, self.dout)]

    def fill(self, layer: Layer, num_tokens: int, seed: int) -> None:
        """Draw the inputs anew, into the same memory."""
        with torch.no_grad():
            for x, drawn in zip((*self.qkv, self.dout), make_inputs(layer, num_tokens, seed), strict=True):
                x.copy_(drawn)


def captured(run: Pass) -> Callable[[int], list[Tensor]]:
    """The pass as a CUDA graph, to be replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay(turn: int = 0) -> list[Tensor]:
        graph.replay()
        return results

    return replay


def reduced(attend: Attend, layer: Layer, num_tokens: int) -> Pass:
    """The pass with attention compiled to CUDA graphs by torch."""
    return Pass(torch.compile(attend, mode="reduce-overhead", fullgraph=True), layer, num_tokens)


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, by the largest value of each."""
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, expected, strict=True))


def cpu_ms(run: Callable[[int], Any]) -> float:
    """ms that the CPU takes to issue one call, the GPU never waited for."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for turn in range(CALLS):
        run(turn)
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return seconds / CALLS * 1e3


def kernels(run: Callable[[int], Any], trace: bool) -> tuple[float, float]:
    """Kernels of one call, copies and fills among them, and their ms on the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        for turn in range(10):
            run(turn)
        torch.cuda.synchronize()
    averages = record.key_averages()
    on_gpu = [event for event in averages if event.device_type == torch.autograd.DeviceType.CUDA]
    if trace:
        print(averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
        print(averages.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=60))
    count = sum(event.count for event in on_gpu) / 10
    return count, sum(event.self_device_time_total for event in on_gpu) / 10 / 1e3


def print_host(run: Callable[[int], Any]) -> None:
    """The functions that the CPU spends most time in, of so many calls; the profiler slows Python down."""
    torch.cuda.synchronize()
    with cProfile.Profile() as record:
        for turn in range(CALLS):
            run(turn)
    torch.cuda.synchronize()
    pstats.Stats(record).sort_stats("tottime").print_stats(30)


def measure(layer: Layer, num_tokens: int, top_k: int | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    config = LighthouseConfig(top_k=top_k)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lighthouse_attention(q, k, v, config)

    eager = Pass(attend, layer, num_tokens)
    for _ in range(WARMUP):
        eager()
    row: dict[str, Any] = {"num_tokens": num_tokens, "top_k": config.resolve_top_k(num_tokens)}
    row["kernels"], row["gpu_ms"] = kernels(eager, arguments.trace)
    row["cpu_ms"] = cpu_ms(eager)
    if arguments.host:
        print_host(eager)
    runs: dict[str, Callable[[int], Any]] = {"eager_ms": eager}
    for name, make in (
        ("graph_ms", lambda: captured(eager)),
        ("reduced_ms", lambda: reduced(attend, layer, num_tokens)),
    ):
        try:
            run = make()
            for _ in range(WARMUP):
                run(0)
            for one in {id(x): x for x in (eager, run) if isinstance(x, Pass)}.values():
                one.fill(layer, num_tokens, seed=7)
            expected = [x.clone() for x in eager()]
            row[name.replace("_ms", "_difference")] = distance([x.clone() for x in run(0)], expected)
            runs[name] = run
        except Exception as error:
            print(f"{name[:-3]} at {num_tokens}: {type(error).__name__}: {str(error).splitlines()[0]}")
            row[name.replace("_ms", "_difference")] = row[name] = None
    dense = Pass(lambda q, k, v: causal_sdpa(q, k, v, scale=None, backend="auto"), layer, num_tokens)
    runs["dense_ms"] = dense
    for name, value in zip(runs, issued_ms(list(runs.values()), DEVICE, CALLS), strict=True):
        row[name] = value
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16_384, 32_768], help="N (default: %(default)s)")
    parser.add_argument("--top_k", type=int, nargs="*", default=[512, 1024], help="budgets (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="query and key/value heads (default: %(default)s)")
    parser.add_argument("--head_dim", type=int, default=128, help="channels of one (default: %(default)s)")
    parser.add_argument("--trace", action="store_true", help="print what takes the time")
    parser.add_argument("--host", action="store_true", help="print which functions of Python take the time")
    parser.add_argument("--csv", type=Path, help="where the rows go")
    arguments = parser.parse_args()
    layer = Layer(arguments.heads, arguments.heads, arguments.head_dim, torch.bfloat16, DEVICE)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    rows = []
    for num_tokens in arguments.lengths:
        for top_k in arguments.top_k:
            row = measure(layer, num_tokens, top_k, arguments)
            print(", ".join(f"{name} {value:.4g}" for name, value in row.items() if value is not None), flush=True)
            rows.append(row)
            if arguments.csv is not None:
                with arguments.csv.open("w", newline="") as stream:
                    writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    main()
