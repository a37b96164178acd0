"""Where the time of a whole training step goes, by kind of kernel.

    python experiments/step_profile.py --model paper --num_tokens 98304 --csv step_profile.csv

Under Lightning's Trainer, blocks compiled, AdamW, gradients clipped: dense attention; Lighthouse in all layers; three
windows of 512 and one Lighthouse layer. Steps are timed first, and one behind them is profiled, which takes longer:
the times of its kernels count, and what the timed step takes beyond their sum is the GPU waiting, "none". Where memory
is short, `--layers` leaves some out. Needs a GPU.
"""

from __future__ import annotations

import argparse
import csv
import gc
from collections import Counter
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lightning_lighthouse import LighthouseCallback
from lightning_lighthouse.attention import kernels
from lightning_lighthouse.bench.steps import WARMUP_STEPS, time_steps
from lightning_lighthouse.model import Decoder

KINDS = ("products", "attention", "Lighthouse", "windows", "elementwise", "optimizer", "copies", "other", "none")
# what the names of kernels hold, the first that fits
PARTS = (
    ("attention", ("sdpa", "flash", "fmha", "compute_dot_do_o", "convert_dq")),
    ("optimizer", ("multi_tensor_apply", "adam")),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "triton_tem")),
    ("elementwise", ("triton_",)),
    ("copies", ("memcpy", "memset", "catarray", "copy")),
    ("elementwise", ("elementwise", "reduce", "softmax", "norm", "index", "scatter", "gather")),
)
LAYERS: dict[str, dict[str, Any]] = {
    "dense": {"enabled": False},
    "all routed": {"layer_types": ["lighthouse"]},
    "three windows": {"layer_types": ["window", "window", "window", "lighthouse"], "window": 512},
}


def own_kernels() -> dict[str, str]:
    """The kind of each kernel of this package, by its name."""
    found = {}
    for module in iter_modules(kernels.__path__):
        members = vars(import_module(f"{kernels.__name__}.{module.name}"))
        for name, member in members.items():
            # what triton.jit makes of a function holds it, also for the interpreter
            home = getattr(getattr(member, "fn", None), "__module__", "")
            if home.startswith(kernels.__name__):
                found[name] = "windows" if home.rpartition(".")[2].startswith("window") else "Lighthouse"
    return found


def kind_of(name: str, own: dict[str, str]) -> str:
    """The kind of a kernel."""
    if name in own:
        return own[name]
    return next((kind for kind, parts in PARTS if any(part in name.lower() for part in parts)), "other")


class ProfiledDecoder(Decoder):
    """A Decoder, one of whose training steps is profiled.

    Args:
        at: The step.
        preset: Of Decoder.
        mode: Of `torch.compile`; None: its default one.
    """

    def __init__(self, at: int, preset: str, mode: str | None) -> None:
        super().__init__(preset=preset)
        self.at, self.mode = at, mode
        self.record = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def configure_model(self) -> None:
        """Compile as `Decoder(compile=True)` does."""
        for part in [*self.blocks, self.head]:
            part.compile(fullgraph=True, dynamic=False, mode=self.mode)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin, with nothing left to do from the step before."""
        # where graphs are captured, their memory is free for the next step
        torch.compiler.cudagraph_mark_step_begin()
        if batch_idx == self.at:
            torch.cuda.synchronize()
            self.record.start()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End, when all is done."""
        if batch_idx == self.at:
            torch.cuda.synchronize()
            self.record.stop()


def measure(layers: str, arguments: argparse.Namespace, own: dict[str, str]) -> dict[str, Any]:
    """One row: ms of a step, and of the kernels of each kind."""
    torch.manual_seed(42)
    model = ProfiledDecoder(WARMUP_STEPS + arguments.repeats, arguments.model, arguments.compile_mode)
    callback = LighthouseCallback(1.0, stop_on_nonfinite=not arguments.unguarded, **LAYERS[layers])
    settings = {"precision": "bf16-mixed", "gradient_clip_val": 1.0}
    device = torch.device("cuda")
    step_ms, peak_gib = time_steps(model, 256, (1, arguments.num_tokens), device, arguments.repeats, callback, settings)
    spent: Counter[str] = Counter()
    slowest: Counter[str] = Counter()
    for event in model.record.key_averages():
        # what is annotated, as the step of the optimizer, spans kernels that are counted by themselves
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spent[kind_of(event.key, own)] += event.self_device_time_total / 1e3
            slowest[event.key] += event.self_device_time_total / 1e3
    for name, ms in slowest.most_common(arguments.kernels):
        print(f"  {ms:8.2f} ms  {kind_of(name, own):11}  {name[:100]}")
    if arguments.cpu:
        print(model.record.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))
    spent["none"] = step_ms - sum(spent.values())
    how = {"compile_mode": arguments.compile_mode or "default", "guarded": not arguments.unguarded}
    row = {"layers": layers, "num_tokens": arguments.num_tokens, **how, "step_ms": step_ms, "peak_gib": peak_gib}
    return row | {kind: spent[kind] for kind in KINDS}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="paper", help="preset of Decoder (default: %(default)s)")
    add("--num_tokens", type=int, default=98_304, help="N (default: %(default)s)")
    add("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS), help="(default: all)")
    add("--repeats", type=int, default=5, help="steps that count (default: %(default)s)")
    add("--kernels", type=int, default=12, help="of the slowest, how many are named (default: %(default)s)")
    add("--cpu", action="store_true", help="print what the CPU spends the step on")
    add("--compile_mode", help="of torch.compile, as reduce-overhead (default: its own)")
    add("--unguarded", action="store_true", help="do not read on the host whether gradients are finite")
    add("--csv", type=Path, help="where the rows go")
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    own, rows = own_kernels(), []
    for layers in arguments.layers:
        try:
            row = measure(layers, arguments, own)
        except torch.OutOfMemoryError:
            print(f"{layers}: out of memory")
            row = None
        gc.collect()
        if row is None:
            continue
        rows.append({"device": torch.cuda.get_device_name(), "model": arguments.model, **row})
        print(", ".join(f"{key} {value:.1f}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
        if arguments.csv is not None:
            with arguments.csv.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
