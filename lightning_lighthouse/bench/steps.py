"""`lighthouse bench --model`: a whole training step under Lightning's Trainer, dense and with Lighthouse."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.bench.rows import line, ratio
from lightning_lighthouse.bench.timing import Layer, durations_ms, mark
from lightning_lighthouse.checks import quoted
from lightning_lighthouse.notices import quiet_lightning
from lightning_lighthouse.routing.targets import DenseLayers

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule

# The first step compiles, the next ones fill the allocator's cache.
WARMUP_STEPS = 3
PRECISIONS: dict[torch.dtype, Literal["bf16-mixed", "32-true"]] = {
    torch.bfloat16: "bf16-mixed",
    torch.float32: "32-true",
}


@dataclass(frozen=True)
class StepRow:
    """One training step of a model, and the peak of all memory; None where not measured."""

    model: str
    num_tokens: int
    attention: str
    dense_layers: str
    compiled: bool
    step_ms: float | None
    tokens_per_second: float | None
    peak_gib: float | None
    repeats: int


def bench_steps(
    model: str,
    layer: Layer,
    settings: Sequence[tuple[int, LighthouseConfig]],
    dense_layers: DenseLayers,
    compiled: bool,
    repeats: int,
) -> Iterator[tuple[LighthouseConfig, StepRow]]:
    """Measure a whole training step under Lightning's Trainer, dense and with Lighthouse, and print as it goes.

    Args:
        model: Preset of `Decoder`.
        layer: Its attention layer: dtype and device count here.
        settings: One length, with each of the settings of Lighthouse.
        dense_layers: Layers that stay dense with Lighthouse, as told to the callback.
        compiled: Compile the model.
        repeats: Steps that count.

    Yields:
        The setting, that of the first one for the dense step, and the row.
    """
    from lightning_lighthouse.training.callback import LighthouseCallback

    num_tokens, first = settings[0]
    layers = dense_layers if isinstance(dense_layers, str) else " ".join(map(str, dense_layers or [])) or "none"
    print(
        f"training step of {quoted(model)} under Lightning's Trainer, batch 1, {num_tokens:,} tokens, "
        f"{'compiled' if compiled else 'not compiled'}, median of {repeats}\n"
        f"layers that stay dense with Lighthouse: {layers}\n"
    )
    print(line("attention", "selection", "step ms", "tokens/s", "peak GiB", "gain"))
    dense_ms = None
    for attention, config in [("dense", first), *(("Lighthouse", config) for _, config in settings)]:
        # on from the first step to the last
        callback = LighthouseCallback(
            1.0, config, dense_layers, enabled=attention == "Lighthouse", layer_types=["lighthouse"]
        )
        step_ms = peak_gib = None
        if attention == "Lighthouse" and not config.pyramid(num_tokens).compresses:
            print(f"{attention}: {num_tokens:,} tokens are too short to gain and get dense attention, left blank")
        else:
            try:
                step_ms, peak_gib = measure_steps(
                    model, num_tokens, layer.dtype, layer.device, repeats, compiled, callback
                )
            except torch.OutOfMemoryError:
                print(f"{attention}: out of memory, left blank")
        gc.collect()
        rate = ratio(num_tokens * 1e3, step_ms)
        if attention == "dense":
            dense_ms = step_ms
        selection = None if attention == "dense" else config.selection
        print(line(attention, selection, step_ms, rate, peak_gib, ratio(dense_ms, step_ms)), flush=True)
        yield config, StepRow(model, num_tokens, attention, layers, compiled, step_ms, rate, peak_gib, repeats)


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
    from lightning_lighthouse.model import Decoder

    torch.manual_seed(42)
    model = Decoder(preset=preset, compile=compiled)  # type: ignore[arg-type]
    settings = {"precision": PRECISIONS[dtype], "gradient_clip_val": 1.0}
    return time_steps(model, 256, (1, num_tokens), device, repeats, callback, settings)


def time_steps(
    model: LightningModule,
    vocabulary: int,
    shape: tuple[int, int],
    device: torch.device,
    repeats: int,
    callback: Callback,
    settings: dict[str, Any],
) -> tuple[float, float | None]:
    """Time training steps of a module under Lightning's Trainer, on one device, over drawn tokens.

    Args:
        model: Takes batches `{"tokens": [B, N + 1]}`.
        vocabulary: Tokens are drawn below it.
        shape: B and N.
        device: Where.
        repeats: Batches that count.
        callback: Routes the attention, or does not.
        settings: More of the Trainer's.

    Returns:
        Median ms from batch to batch, and the peak of all memory in GiB; None on a CPU.
    """
    # Lightning takes seconds to import, and one layer does not need it
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    marks = []

    class StepClock(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if device.type == "cuda" and batch_idx == WARMUP_STEPS:
                torch.cuda.reset_peak_memory_stats()
            marks.append(mark(device))

    torch.compiler.reset()
    # the start of one more step ends the last one that counts
    num_steps = WARMUP_STEPS + repeats + 1
    batch_size, num_tokens = shape
    batches: Any = [{"tokens": torch.randint(vocabulary, (batch_size, num_tokens + 1))} for _ in range(num_steps)]
    with _quiet():
        trainer = pl.Trainer(
            accelerator=device.type,
            devices=1,
            callbacks=[StepClock(), callback],
            enable_progress_bar=False,
            enable_model_summary=False,
            # neither logger nor checkpoint nor validation
            fast_dev_run=num_steps,
            **settings,
        )
        trainer.fit(model, DataLoader(batches, batch_size=None))
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return median(durations_ms(marks)[WARMUP_STEPS:]), peak_gib


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what is said of a run that validates nothing, reads one list and is meant to end early."""
    with quiet_lightning(), warnings.catch_warnings():
        for message in (
            "Lighthouse: .* before the switch",
            "You defined a `validation_step` but have no `val_dataloader`",
            "The 'train_dataloader' does not have many workers",
            r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
