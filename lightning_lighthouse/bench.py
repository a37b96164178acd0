"""`lighthouse bench`: dense SDPA, Lighthouse Attention and its floor, measured in one run on the user's own device.

One layer over a range of lengths, or with `--model` a whole training step under Lightning's Trainer. Nothing is timed
until the chosen backend has agreed with the reference on a small case. What cannot be measured is left blank.
"""

# N tokens, S gathered entries, D head dim

from __future__ import annotations

import csv
import gc
import io
import platform
import subprocess
import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from lightning_lighthouse.arguments import Parser
from lightning_lighthouse.attention import lighthouse_attention
from lightning_lighthouse.bench_timing import (
    Layer,
    Timing,
    copy_bandwidth,
    crossover,
    disagreement,
    floor,
    measure,
    measure_steps,
)
from lightning_lighthouse.config import LighthouseConfig
from lightning_lighthouse.sdpa import causal_sdpa

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LENGTHS = {"cuda": [8192, 16384, 32768, 65536, 98304, 131072], "cpu": [512, 1024, 2048, 4096]}
MODEL_LENGTH = {"cuda": 98304, "cpu": 1024}


@dataclass(frozen=True)
class LayerRow:
    """One attention layer at one length: ms, GB/s, and MiB of extra memory; None where not measured."""

    num_tokens: int
    num_gathered: int | None
    dense_forward_ms: float | None
    lighthouse_forward_ms: float | None
    floor_forward_ms: float | None
    dense_ms: float | None
    lighthouse_ms: float | None
    floor_ms: float | None
    dense_peak_mib: float | None
    lighthouse_peak_mib: float | None
    gathered_forward_ms: float | None
    gathered_ms: float | None
    copy_gb_per_s: float
    repeats: int


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


def main(argv: Sequence[str] | None = None) -> int:
    """`lighthouse bench`.

    Args:
        argv: Arguments after the command's name; None: those of the process.

    Returns:
        Exit status: 0 when measured, 1 when the backend is wrong, 2 for wrong arguments.
    """
    parser = _make_parser()
    asked = parser.parse_args(argv)
    try:
        config = LighthouseConfig(**{field.name: getattr(asked, field.name) for field in fields(LighthouseConfig)})
        layer = _complete(asked)
        for num_tokens in asked.lengths:
            # refuses what cannot be numbered
            config.pyramid(num_tokens)
        described = describe(layer, config)
        row_class = StepRow if asked.model else LayerRow
        if asked.csv is not None:
            check_csv(asked.csv, [*described, *(field.name for field in fields(row_class))])
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))

    versions = [f"{name} {described[name]}" for name in ("torch", "triton", "cudnn") if described[name]]
    print(", ".join([described["device"], *versions, described["dtype"]]))
    if layer.device.type == "cpu":
        print("on a CPU: these times say nothing about a GPU, and memory is not measured")
    problem = disagreement(layer, config)
    if problem is not None:
        print(f"lighthouse bench: {problem}; nothing was timed", file=sys.stderr)
        return 1
    bench = bench_steps if asked.model else bench_layer
    for row in bench(asked, layer, config):
        if asked.csv is not None:
            append_csv(asked.csv, {**described, **asdict(row)})
    return 0


def _make_parser() -> Parser:
    parser = Parser(
        prog="lighthouse bench",
        description="Measure dense and Lighthouse Attention here: one layer, or with --model a whole training step.",
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", metavar="N", help="tokens (default: up to 131072, on a CPU up to 4096)")
    add("--heads", type=int, metavar="H", help="query heads of the layer (default: 8)")
    add("--kv-heads", type=int, metavar="G", help="its key/value heads (default: as many)")
    add("--head-dim", type=int, metavar="D", help="its head dim (default: 128)")
    add("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    add("--dtype", choices=list(DTYPES), help="default: bfloat16, on a CPU float32")
    add("--repeats", type=int, metavar="R", help="timed runs; their median counts (default: 20, on a CPU 5)")
    add("--max-dense-length", type=int, metavar="N", help="leave dense attention blank above this length")
    add("--csv", type=Path, metavar="FILE", help="append a row for each line of the table")
    add("--model", choices=["toy", "small", "base", "paper"], help="measure a training step of this preset, at one N")
    add("--dense-layers", type=int, nargs="*", metavar="L", help="its layers that stay dense; nothing after it: none")
    add("--compile", action=BooleanOptionalAction, help="compile the model (default: on a GPU)")
    group = parser.add_argument_group("Lighthouse Attention", "the fields of LighthouseConfig")
    for name, hint in get_type_hints(LighthouseConfig).items():
        default = getattr(LighthouseConfig, name)
        settings: dict[str, Any] = {"default": default, "help": f"default: {default}"}
        if hint is bool:
            settings["action"] = BooleanOptionalAction
        elif isinstance(hint, UnionType) or not get_args(hint):
            settings |= {"type": next(iter(get_args(hint)), hint), "metavar": "VALUE"}
        else:
            settings["choices"] = get_args(hint)
        group.add_argument(_option(name), **settings)
    return parser


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _complete(asked: Namespace) -> Layer:
    """Fill in the defaults that depend on the device and the model; ValueError for what does not fit together."""
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none; use --device cpu")
    asked.device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("heads", "kv_heads", "head_dim", "max_dense_length") if asked.model else ("dense_layers", "compile"):
        if getattr(asked, name) is not None:
            raise ValueError(
                f"{_option(name)} does not go {'with' if asked.model else 'without'} --model; leave it out"
            )
    if asked.model:
        from lightning_lighthouse.model import PRESETS

        shape = PRESETS[asked.model]
        asked.heads, asked.kv_heads, asked.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        asked.lengths = asked.lengths or [MODEL_LENGTH[asked.device]]
        if len(asked.lengths) > 1:
            raise ValueError(f"--model takes one length, got {len(asked.lengths)}")
        if asked.dtype == "float16":
            raise ValueError("--dtype float16 does not go with --model; use bfloat16 or float32")
        if asked.compile is None:
            asked.compile = asked.device == "cuda"

    asked.heads = 8 if asked.heads is None else asked.heads
    defaults = {
        "kv_heads": asked.heads,
        "head_dim": 128,
        "lengths": LENGTHS[asked.device],
        "dtype": "bfloat16" if asked.device == "cuda" else "float32",
        "repeats": 20 if asked.device == "cuda" else 5,
    }
    for name, default in defaults.items():
        if getattr(asked, name) is None:
            setattr(asked, name, default)
    for name in ("heads", "kv_heads", "head_dim", "repeats", "lengths"):
        smallest = min(asked.lengths) if name == "lengths" else getattr(asked, name)
        if smallest < 1:
            raise ValueError(f"{_option(name)} must be at least 1, got {smallest}")
    if asked.heads % asked.kv_heads:
        raise ValueError(f"--heads must be a multiple of --kv-heads, got {asked.heads} and {asked.kv_heads}")
    return Layer(asked.heads, asked.kv_heads, asked.head_dim, DTYPES[asked.dtype], torch.device(asked.device))


def bench_layer(asked: Namespace, layer: Layer, config: LighthouseConfig) -> Iterator[LayerRow]:
    """Measure one attention layer at each length and print as it goes."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_sdpa(q, k, v, scale=None, backend=config.sdpa)

    def lighthouse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lighthouse_attention(q, k, v, config)

    def timed(attend: Any, num_tokens: int) -> Timing:
        try:
            return measure(attend, layer, num_tokens, asked.repeats)
        except torch.OutOfMemoryError:
            print(f"{attend.__name__} at {num_tokens} tokens: out of memory, left blank")
            return Timing()

    gb_per_s = copy_bandwidth(layer.device, asked.repeats)
    print(
        f"one layer, batch 1, {layer.heads} query and {layer.kv_heads} key/value heads of {layer.head_dim}; ms, median "
        f"of {asked.repeats}; peak: extra memory in MiB\n"
        f"floor: SDPA on the S gathered entries alone + {layer.moved_rows} N-rows and {layer.moved_rows} S-rows of "
        f"{layer.head_dim} (forward: half of them) at {gb_per_s:,.0f} GB/s, the speed of a copy measured now\n"
    )
    print(f"{'forward':>43}{'forward + backward':>33}{'peak':>44}")
    print(_line("N", "S", *["dense", "Lighthouse"] * 2, "floor", "gain", "/ floor", "dense", "Lighthouse"))
    rows = []
    for num_tokens in sorted(set(asked.lengths)):
        shape = config.pyramid(num_tokens)
        plain = ours = gathered = Timing()
        if asked.max_dense_length is None or num_tokens <= asked.max_dense_length:
            plain = timed(dense, num_tokens)
        if shape.compresses:
            ours, gathered = timed(lighthouse, num_tokens), timed(dense, shape.num_gathered)
        least = floor(layer, num_tokens, shape.num_gathered, gathered, gb_per_s)
        row = LayerRow(
            num_tokens=num_tokens,
            num_gathered=shape.num_gathered if shape.compresses else None,
            dense_forward_ms=plain.forward_ms,
            lighthouse_forward_ms=ours.forward_ms,
            floor_forward_ms=least.forward_ms,
            dense_ms=plain.both_ms,
            lighthouse_ms=ours.both_ms,
            floor_ms=least.both_ms,
            dense_peak_mib=plain.peak_mib,
            lighthouse_peak_mib=ours.peak_mib,
            gathered_forward_ms=gathered.forward_ms,
            gathered_ms=gathered.both_ms,
            copy_gb_per_s=gb_per_s,
            repeats=asked.repeats,
        )
        print(
            _line(
                *(row.num_tokens, row.num_gathered, row.dense_forward_ms, row.lighthouse_forward_ms),
                *(row.dense_ms, row.lighthouse_ms, row.floor_ms, _ratio(row.dense_ms, row.lighthouse_ms)),
                *(_ratio(row.lighthouse_ms, row.floor_ms), row.dense_peak_mib, row.lighthouse_peak_mib),
            ),
            flush=True,
        )
        rows.append(row)
        yield row
    print()
    print(
        f"forward: {_describe_crossover([(r.num_tokens, r.dense_forward_ms, r.lighthouse_forward_ms) for r in rows])}"
    )
    print(f"forward + backward: {_describe_crossover([(r.num_tokens, r.dense_ms, r.lighthouse_ms) for r in rows])}")


def _describe_crossover(points: Sequence[tuple[int, float | None, float | None]]) -> str:
    measured = [(n, dense, ours) for n, dense, ours in points if dense is not None and ours is not None]
    if not measured:
        return "no length at which both were measured"
    length, estimate = crossover(measured)
    if length is None:
        return f"Lighthouse does not win up to {measured[-1][0]:,} tokens"
    between = f", the crossover is at about {estimate:,.0f}" if estimate else ", the shortest length measured"
    return f"Lighthouse wins at {length:,} tokens{between}"


def bench_steps(asked: Namespace, layer: Layer, config: LighthouseConfig) -> Iterator[StepRow]:
    """Measure a whole training step under Lightning's Trainer, dense and with Lighthouse, and print as it goes."""
    from lightning_lighthouse.callback import LighthouseCallback

    num_tokens = asked.lengths[0]
    layers = "by default" if asked.dense_layers is None else " ".join(map(str, asked.dense_layers)) or "none"
    print(
        f"training step of {asked.model!r} under Lightning's Trainer, batch 1, {num_tokens:,} tokens, "
        f"{'compiled' if asked.compile else 'not compiled'}, median of {asked.repeats}\n"
        f"layers that stay dense with Lighthouse: {layers}\n"
    )
    print(_line("attention", "step ms", "tokens/s", "peak GiB", "gain"))
    dense_ms = None
    for attention in ("dense", "Lighthouse"):
        # on from the first step to the last
        callback = LighthouseCallback(1.0, config, asked.dense_layers, enabled=attention == "Lighthouse")
        step_ms = peak_gib = None
        try:
            step_ms, peak_gib = measure_steps(
                asked.model, num_tokens, layer.dtype, layer.device, asked.repeats, asked.compile, callback
            )
        except torch.OutOfMemoryError:
            print(f"{attention}: out of memory, left blank")
        gc.collect()
        rate = _ratio(num_tokens * 1e3, step_ms)
        if attention == "dense":
            dense_ms = step_ms
        print(_line(attention, step_ms, rate, peak_gib, _ratio(dense_ms, step_ms)), flush=True)
        yield StepRow(asked.model, num_tokens, attention, layers, asked.compile, step_ms, rate, peak_gib, asked.repeats)


def describe(layer: Layer, config: LighthouseConfig) -> dict[str, Any]:
    """What every row says of the machine, the software and the settings."""
    on_gpu = layer.device.type == "cuda"
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(layer.device) if on_gpu else cpu,
        "torch": torch.__version__,
        "triton": triton,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "heads": layer.heads,
        "kv_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "dtype": str(layer.dtype).removeprefix("torch."),
        **asdict(config),
    }


def _commit() -> str | None:
    """The commit of this package's own checkout, with "-dirty" where files differ; None where there is none."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def check_csv(path: Path, columns: Sequence[str]) -> None:
    """Raise ValueError where rows with `columns` cannot be appended to `path`."""
    if not path.parent.is_dir():
        raise ValueError(f"--csv {path}: there is no folder {path.parent}; create it")
    if not path.exists():
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file), None)
    if header is not None and header != list(columns):
        differing = sorted(set(header) ^ set(columns))
        raise ValueError(
            f"--csv {path} has other columns ({', '.join(differing) or 'another order'}); name another file"
        )


def append_csv(path: Path, row: dict[str, Any]) -> None:
    """Append `row` to `path`, under a header where the file is new. None is left blank."""
    text = io.StringIO()
    writer = csv.DictWriter(text, row.keys(), lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    # in one write, so that an interrupted run leaves whole rows
    with path.open("a", newline="") as file:
        file.write(text.getvalue())


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator


def _line(*values: Any) -> str:
    return " ".join(f"{_cell(value):>10}" for value in values)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else value
