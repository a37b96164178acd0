"""How `lighthouse bench` checks a backend and measures: time on the device's own clock, memory, floor, crossover."""

# B batch, H query heads, G key/value heads, N tokens, D head dim

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_lighthouse.attention import lighthouse_attention
from lightning_lighthouse.config import LighthouseConfig

if TYPE_CHECKING:
    from lightning.pytorch import Callback

# Two sets of inputs take turns, so that none is in the cache because it was just used.
INPUT_SETS = 2
WARMUP_RUNS = 3
# The first step compiles, the next ones fill the allocator's cache.
WARMUP_STEPS = 3
PRECISIONS: dict[torch.dtype, Literal["bf16-mixed", "32-true"]] = {
    torch.bfloat16: "bf16-mixed",
    torch.float32: "32-true",
}


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

    def moved_bytes(self, num_rows: int) -> int:
        """Bytes that forward + backward must move for `num_rows` tokens and entries."""
        return self.moved_rows * num_rows * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Timing:
    """Medians in ms of a forward and of a forward + backward pass, and the peak of extra memory in MiB."""

    forward_ms: float | None = None
    both_ms: float | None = None
    peak_mib: float | None = None


def make_inputs(layer: Layer, num_tokens: int, seed: int) -> list[Tensor]:
    """Random q, k, v and gradient of the output, `[1, H or G, N, D]`, laid out as a model does: `[1, N, H or G, D]`."""
    generator = torch.Generator(layer.device).manual_seed(seed)
    inputs = []
    for heads in (layer.heads, layer.kv_heads, layer.kv_heads, layer.heads):
        x_BNHD = torch.randn(1, num_tokens, heads, layer.head_dim, generator=generator, device=layer.device)
        inputs.append(x_BNHD.to(layer.dtype).transpose(1, 2))
    return inputs


def disagreement(layer: Layer, config: LighthouseConfig) -> str | None:
    """How the chosen backend differs from the reference on a small case; None where it does not.

    Output and gradients may be off by twice the error of the reference in the layer's dtype, and one rounding. Both
    errors are those against float64.
    """
    num_tokens = 4099 if layer.device.type == "cuda" else 1031
    # the first budget makes two tiles where the length allows it
    cases = [replace(config, top_k=top_k) for top_k in (256, 64, 16, 4, 1)]
    chosen = next((case for case in cases if case.pyramid(num_tokens).compresses), None)
    if chosen is None:
        return f"num_levels={config.num_levels} and pooling_factor={config.pooling_factor} are too large to check"
    kv_heads = min(2, layer.kv_heads)
    small = replace(layer, heads=layer.heads // layer.kv_heads * kv_heads, kv_heads=kv_heads)

    inputs = make_inputs(small, num_tokens, seed=42)
    reference = replace(chosen, backend="reference")
    # fused attention knows no float64
    exact = _results([x.double() for x in inputs], replace(reference, sdpa="math"))
    twin, actual = _results(inputs, reference), _results(inputs, chosen)
    for name, truth, from_twin, value in zip(("output", "dq", "dk", "dv"), exact, twin, actual, strict=True):
        largest = truth.abs().max()
        allowed = 2 * (from_twin - truth).abs().max() / largest + torch.finfo(layer.dtype).eps
        error = (value - truth).abs().max() / largest
        # written so that a NaN fails
        if not error <= allowed:
            return (
                f"backend {config.backend!r} is wrong on {layer.device.type}: {name} is off by {error:.2g} of its "
                f"largest value, {allowed:.2g} is allowed"
            )
    return None


def _results(inputs: list[Tensor], config: LighthouseConfig) -> list[Tensor]:
    q, k, v = leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = lighthouse_attention(q, k, v, config)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, leaves, inputs[3]))]


def measure(attend: Callable[..., Tensor], layer: Layer, num_tokens: int, repeats: int) -> Timing:
    """Time `attend(q, k, v)` on random inputs of `num_tokens` tokens."""
    sets = [make_inputs(layer, num_tokens, seed) for seed in range(INPUT_SETS)]
    for *inputs, _ in sets:
        for x in inputs:
            x.requires_grad_()

    def forward(turn: int) -> None:
        *inputs, _ = sets[turn % INPUT_SETS]
        attend(*inputs)

    def both(turn: int) -> None:
        *inputs, weight = sets[turn % INPUT_SETS]
        torch.autograd.grad(attend(*inputs), inputs, weight)

    forward_ms = median_ms(forward, layer.device, repeats)
    both_ms = median_ms(both, layer.device, repeats)
    return Timing(forward_ms, both_ms, _peak_mib(both, layer.device))


def measure_steps(
    preset: str,
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    compiled: bool,
    callback: Callback,
) -> tuple[float, float | None]:
    """Time training steps of a preset under Lightning's Trainer, batch 1, AdamW, gradients clipped.

    Args:
        preset: Of `Decoder`.
        num_tokens: N.
        dtype: Float32, or that of mixed precision.
        device: Where.
        repeats: Steps that count.
        compiled: Compile the model.
        callback: Routes the attention, or does not.

    Returns:
        Median ms of a step, and the peak of all memory in GiB; None on a CPU.
    """
    # Lightning takes seconds to import, and one layer does not need it
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from lightning_lighthouse.model import Decoder

    marks = []

    class StepClock(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if device.type == "cuda" and batch_idx == WARMUP_STEPS:
                torch.cuda.reset_peak_memory_stats()
            marks.append(mark(device))

    torch.compiler.reset()
    torch.manual_seed(42)
    model = Decoder(preset=preset, compile=compiled)  # type: ignore[arg-type]
    # the start of one more step ends the last one that counts
    num_steps = WARMUP_STEPS + repeats + 1
    batches: Any = [{"tokens": torch.randint(256, (1, num_tokens + 1))} for _ in range(num_steps)]
    with _quiet():
        trainer = pl.Trainer(
            accelerator=device.type,
            devices=1,
            precision=PRECISIONS[dtype],
            gradient_clip_val=1.0,
            callbacks=[StepClock(), callback],
            enable_progress_bar=False,
            enable_model_summary=False,
            # neither logger nor checkpoint nor validation
            fast_dev_run=num_steps,
        )
        trainer.fit(model, DataLoader(batches, batch_size=None))
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return median(durations_ms(marks)[WARMUP_STEPS:]), peak_gib


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what is said of a run that validates nothing, reads one list and is meant to end early."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                "Lighthouse: .* before the switch",
                "You defined a `validation_step` but have no `val_dataloader`",
                "The 'train_dataloader' does not have many workers",
                r"`isinstance\(treespec, LeafSpec\)` is deprecated",
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.setLevel(level)


def median_ms(run: Callable[[int], Any], device: torch.device, repeats: int) -> float:
    """The median duration in ms of `run(0)`, `run(1)`, ..., after a warm-up."""
    for turn in range(WARMUP_RUNS):
        run(turn)
    marks = [mark(device)]
    for turn in range(WARMUP_RUNS, WARMUP_RUNS + repeats):
        run(turn)
        marks.append(mark(device))
    return median(durations_ms(marks))


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


def _peak_mib(run: Callable[[int], None], device: torch.device) -> float | None:
    if device.type == "cpu":
        return None
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
    return 2 * num_bytes / median_ms(lambda _: target.copy_(source), device, repeats) / 1e6


def floor(layer: Layer, num_tokens: int, num_gathered: int, gathered: Timing, gb_per_s: float) -> Timing:
    """The least time a layer can take: attention over the gathered entries, and every row moved once.

    Args:
        layer: The layer.
        num_tokens: N.
        num_gathered: S.
        gathered: Dense attention over S entries alone.
        gb_per_s: Speed of a copy, read and written.

    Returns:
        The floor; blank where `gathered` is.
    """
    if gathered.forward_ms is None or gathered.both_ms is None:
        return Timing()
    moving_ms = layer.moved_bytes(num_tokens + num_gathered) / gb_per_s / 1e6
    return Timing(gathered.forward_ms + moving_ms / 2, gathered.both_ms + moving_ms)


def crossover(points: Sequence[tuple[int, float, float]]) -> tuple[int | None, float | None]:
    """Where Lighthouse starts to win.

    Args:
        points: `(tokens, dense ms, Lighthouse ms)`, by ascending length.

    Returns:
        The smallest measured length at which it wins, and the length between the point before and this one at which
        the gain passes 1, on logarithmic scales. None where there is none.
    """
    before = None
    for num_tokens, dense_ms, lighthouse_ms in points:
        length, gain = math.log(num_tokens), math.log(dense_ms / lighthouse_ms)
        if gain > 0:
            if before is None:
                return num_tokens, None
            weight = before[1] / (before[1] - gain)
            return num_tokens, math.exp(before[0] + weight * (length - before[0]))
        before = length, gain
    return None, None
