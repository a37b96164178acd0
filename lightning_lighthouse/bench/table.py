"""The table of `lighthouse bench` for one layer: settings one after another, a line each, and what they add up to."""

# N tokens, S gathered entries, D head dim

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.bench.layer import STAGES, LayerRow, Timing, measure_dense, measure_row
from lightning_lighthouse.bench.rows import line, ratio
from lightning_lighthouse.bench.timing import Layer, copy_bandwidth

Setting = tuple[int, LighthouseConfig]
Measured = tuple[LighthouseConfig, LayerRow]


def bench_layer(layer: Layer, settings: Sequence[Setting], dense_up_to: int | None, repeats: int) -> Iterator[Measured]:
    """Measure one attention layer at each setting and print as it goes.

    Args:
        layer: The layer.
        settings: Lengths, and what Lighthouse is told at each.
        dense_up_to: Longest sequence for dense attention; None: all.
        repeats: Timed calls of each, at least.

    Yields:
        What Lighthouse was told, its budget resolved, and the row.
    """
    gb_per_s = copy_bandwidth(layer.device, repeats)
    print(
        f"one layer, batch 1, {layer.heads} query and {layer.kv_heads} key/value heads of {layer.head_dim}\n"
        "ms of a call among calls issued behind one another; alone: of one call by itself; peak: extra memory in MiB\n"
        "floor: SDPA alone on the S rows that the layer gathered + "
        f"{layer.moved_rows} N-rows and {layer.moved_rows} S-rows of {layer.head_dim} (forward: half of them) at "
        f"{gb_per_s:,.0f} GB/s, the speed of a copy measured now\n"
        "stages: us on the device alone, in the order of the layer; ' is the backward\n"
    )
    print(f"{'forward':>65}{'forward + backward':>33}{'peak':>66}")
    columns = ("N", "L, p, k", "selection", "S", *["dense", "Lighthouse"] * 2, "alone", "floor", "/ floor", "gain")
    print(line(*columns, "dense", "Lighthouse"))
    dense: dict[int, Timing] = {}
    measured = []
    for num_tokens, asked in settings:
        config = replace(asked, top_k=asked.resolve_top_k(num_tokens))
        if num_tokens not in dense:
            is_wanted = dense_up_to is None or num_tokens <= dense_up_to
            dense[num_tokens] = measure_dense(layer, num_tokens, config.sdpa, repeats) if is_wanted else Timing()
        row = measure_row(layer, num_tokens, config, dense[num_tokens], gb_per_s, repeats)
        print("\n".join(_lines(config, row)), flush=True)
        measured.append((asked, row))
        yield config, row
    print()
    print("\n".join([*_comparisons(measured), *_crossovers(measured)]))


def _lines(config: LighthouseConfig, row: LayerRow) -> Iterator[str]:
    yield line(
        *(row.num_tokens, _sizes(config), _choice(config), row.num_gathered),
        *(row.dense_forward_ms, row.lighthouse_forward_ms, row.dense_ms, row.lighthouse_ms),
        *(row.lighthouse_latency_ms, row.floor_ms, row.of_floor, row.times_dense),
        *(row.dense_peak_mib, row.lighthouse_peak_mib),
    )
    if row.gathered_ms is not None:
        times = {name: getattr(row, f"{name}_us") for name in STAGES}
        stages = "  ".join(f"{name.replace('_backward', chr(39))} {us:,.0f}" for name, us in times.items())
        yield f"{'':>10} own rows alone {row.gathered_ms:.4g} ms; {stages}"


def _sizes(config: LighthouseConfig) -> str:
    top_k = "auto" if config.top_k is None else config.top_k
    return f"{config.num_levels} {config.pooling_factor} {top_k}"


def _choice(config: LighthouseConfig) -> str:
    scorer = "" if config.scorer == "norm" else f"/{config.scorer}"
    return config.selection + scorer + ("" if config.rotate == "before" else f"/{config.rotate}")


def _comparisons(measured: Sequence[Measured]) -> Iterator[str]:
    """Selections, scorers and rotations against the first one at the same sizes."""
    first: dict[tuple[int, str], Measured] = {}
    for config, row in measured:
        other, before = first.setdefault((row.num_tokens, _sizes(config)), (config, row))
        share = ratio(row.lighthouse_ms, before.lighthouse_ms)
        if other != config and share is not None:
            at = f"{row.num_tokens:,} tokens, {_sizes(config)}"
            yield f"{at}: {_choice(config)} takes {share:.3f} of {_choice(other)}"


def _crossovers(measured: Sequence[Measured]) -> Iterator[str]:
    """From where on Lighthouse wins, for each setting that was measured over lengths."""
    series: dict[LighthouseConfig, list[LayerRow]] = {}
    for config, row in measured:
        series.setdefault(config, []).append(row)
    for config, rows in series.items():
        if len(series) > 1 and len(rows) == 1:
            continue
        which = f"{_sizes(config)} {_choice(config)}: " if len(series) > 1 else ""
        points = {
            "forward": [(r.num_tokens, r.dense_forward_ms, r.lighthouse_forward_ms) for r in rows],
            "forward + backward": [(r.num_tokens, r.dense_ms, r.lighthouse_ms) for r in rows],
        }
        for name, values in points.items():
            yield f"{which}{name}: {_describe_crossover(values)}"


def _describe_crossover(points: Sequence[tuple[int, float | None, float | None]]) -> str:
    measured = [(n, dense, ours) for n, dense, ours in points if dense is not None and ours is not None]
    if not measured:
        return "no length at which both were measured"
    length, estimate = crossover(measured)
    if length is None:
        return f"Lighthouse does not win up to {measured[-1][0]:,} tokens"
    between = f", the crossover is at about {estimate:,.0f}" if estimate else ", the shortest length measured"
    return f"Lighthouse wins at {length:,} tokens{between}"


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
