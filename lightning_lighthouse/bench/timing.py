"""How `lighthouse bench` reads a clock: calls behind one another, one call alone, the device alone, memory, a copy."""

# B batch, H query heads, G key/value heads, N tokens, D head dim

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.attention.rotation import Rotation

Run = Callable[[int], Any]

# Two sets of inputs take turns, so that none is in the cache because it was just used.
INPUT_SETS = 2
WARMUP_RUNS = 3
# What is compared takes turns, so that a drift of the clocks meets all alike.
ROUNDS = 5
# Calls between two events: long enough that the events and the start do not count.
ROUND_MS = 20.0
# The device waits this long while the CPU issues what is to be timed; cycles of a GPU's clock, about 10 ms.
HEAD_START = 20_000_000


@dataclass(frozen=True)
class Layer:
    """An attention layer to measure, and where it runs."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def moved_rows(self) -> int:
        """Rows of D that forward + backward must move for each token and each entry, half of them forward.

        q, k, v and the output are read or written once, and so are their gradients.
        """
        return 4 * (self.heads + self.kv_heads)

    @cached_property
    def rotation(self) -> Rotation:
        """Rotary positions over the whole head, for rotate="after"; made once, as a model's are."""
        exponents = torch.arange(0, self.head_dim, 2, device=self.device) / self.head_dim
        return Rotation(10_000.0**-exponents)

    def moved_bytes(self, num_rows: int) -> int:
        """Bytes that forward + backward must move for `num_rows` tokens and entries."""
        return self.moved_rows * num_rows * self.head_dim * self.dtype.itemsize


def make_inputs(layer: Layer, num_tokens: int, seed: int) -> list[Tensor]:
    """Random q, k, v and gradient of the output, `[1, H or G, N, D]`, laid out as a model does: `[1, N, H or G, D]`."""
    generator = torch.Generator(layer.device).manual_seed(seed)
    inputs = []
    for heads in (layer.heads, layer.kv_heads, layer.kv_heads, layer.heads):
        x_BNHD = torch.randn(1, num_tokens, heads, layer.head_dim, generator=generator, device=layer.device)
        inputs.append(x_BNHD.to(layer.dtype).transpose(1, 2))
    return inputs


def issued_ms(runs: Sequence[Run], device: torch.device, repeats: int) -> list[float]:
    """ms of a call of each of `runs` among calls issued behind one another, as training issues them.

    Each is called many times between two events; where the CPU cannot issue as fast as the device works, that counts.
    The runs take turns, and the median over the rounds is returned.

    Args:
        runs: Called with 0, 1, ...
        device: Where they work.
        repeats: Calls of each, at least, all rounds together.
    """
    counts = []
    for run in runs:
        for turn in range(WARMUP_RUNS):
            run(turn)
        once_ms = _block_ms(run, device, 1)
        on_gpu = device.type == "cuda"
        counts.append(max(math.ceil(repeats / ROUNDS), math.ceil(ROUND_MS / once_ms) if on_gpu else 1))
    rounds = [[_block_ms(run, device, count) for run, count in zip(runs, counts, strict=True)] for _ in range(ROUNDS)]
    return [median(times) for times in zip(*rounds, strict=True)]


def _block_ms(run: Run, device: torch.device, count: int) -> float:
    marks = [mark(device)]
    for turn in range(count):
        run(turn)
    marks.append(mark(device))
    return durations_ms(marks)[0] / count


def latency_ms(run: Run, device: torch.device, repeats: int) -> float:
    """Median ms of one call alone: from its start on an idle device to the end of its work."""
    times = []
    for turn in range(WARMUP_RUNS + repeats):
        synchronize(device)
        start = time.perf_counter()
        run(turn)
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return median(times[WARMUP_RUNS:])


def device_ms(run: Run, device: torch.device, repeats: int) -> float:
    """Mean ms of a call on the device alone: the CPU issues all calls before the first one starts."""
    for turn in range(WARMUP_RUNS):
        run(turn)
    if device.type == "cpu":
        return _block_ms(run, device, repeats)
    cycles = HEAD_START
    while True:
        torch.cuda.synchronize()
        # the one way of torch to keep a stream busy without touching memory
        torch.cuda._sleep(cycles)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for turn in range(repeats):
            run(turn)
        end.record()
        was_late = start.query()
        torch.cuda.synchronize()
        # a run that waits for the device can never be issued ahead of it
        if not was_late or cycles > 10 * HEAD_START:
            return start.elapsed_time(end) / repeats
        cycles *= 4


def synchronize(device: torch.device) -> None:
    """Wait for the work of `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def mark(device: torch.device) -> Any:
    """This moment: on a GPU, the one at which its work so far is done."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def durations_ms(marks: list[Any]) -> list[float]:
    """The times in ms between consecutive marks."""
    if isinstance(marks[0], float):
        return [(after - before) * 1e3 for before, after in pairwise(marks)]
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def peak_mib(run: Run, device: torch.device) -> float | None:
    """The most memory in MiB that one call needs beyond what is there; None on a CPU."""
    if device.type == "cpu":
        return None
    run(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(0)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """GB/s, read and written, of a copy on `device`."""
    # far beyond any cache
    num_bytes = 2**30 if device.type == "cuda" else 2**27
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / issued_ms([lambda _: target.copy_(source)], device, repeats)[0] / 1e6
