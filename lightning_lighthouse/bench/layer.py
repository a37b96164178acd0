"""`lighthouse bench` for one attention layer: dense, Lighthouse, its stages and its floor.

The floor is SDPA alone on the rows that the layer itself gathered, and every row of the layer moved once.
"""

# N tokens, S gathered entries, D head dim

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lighthouse.attention.backends import choose_stages
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.lighthouse import lighthouse_attention, score_entries
from lightning_lighthouse.attention.sdpa import causal_sdpa
from lightning_lighthouse.bench.rows import ratio
from lightning_lighthouse.bench.timing import (
    INPUT_SETS,
    Layer,
    Run,
    device_ms,
    issued_ms,
    latency_ms,
    make_inputs,
    peak_mib,
)

# in the order in which a layer runs them
STAGES = ("score", "select", "gather", "attend", "scatter", "scatter_backward", "attend_backward", "gather_backward")
# one call alone and the stages vary less than the whole; a few of them tell
FEW = 10


@dataclass(frozen=True)
class Timing:
    """ms of a forward, of a forward + backward, and of one such call alone; extra memory in MiB; None: not measured."""

    forward_ms: float | None = None
    both_ms: float | None = None
    latency_ms: float | None = None
    peak_mib: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """One attention layer at one length; None where not measured.

    ms of calls issued behind one another and, as latency, of one call alone; us of the stages on the device alone;
    MiB of extra memory; GB/s. `gathered` is SDPA alone on the layer's own gathered rows.
    """

    num_tokens: int
    num_gathered: int | None
    dense_forward_ms: float | None
    lighthouse_forward_ms: float | None
    floor_forward_ms: float | None
    dense_ms: float | None
    lighthouse_ms: float | None
    floor_ms: float | None
    of_floor: float | None
    times_dense: float | None
    dense_latency_ms: float | None
    lighthouse_latency_ms: float | None
    dense_peak_mib: float | None
    lighthouse_peak_mib: float | None
    gathered_forward_ms: float | None
    gathered_ms: float | None
    score_us: float | None
    select_us: float | None
    gather_us: float | None
    attend_us: float | None
    scatter_us: float | None
    scatter_backward_us: float | None
    attend_backward_us: float | None
    gather_backward_us: float | None
    copy_gb_per_s: float
    repeats: int


def measure_dense(layer: Layer, num_tokens: int, sdpa: str, repeats: int) -> Timing:
    """Dense SDPA over `num_tokens` tokens; blank where it does not fit into memory."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_sdpa(q, k, v, scale=None, backend=sdpa)

    try:
        forward, both = passes(dense, input_sets(layer, num_tokens))
        forward_ms, both_ms = issued_ms([forward, both], layer.device, repeats)
        alone_ms = latency_ms(both, layer.device, min(repeats, FEW))
        return Timing(forward_ms, both_ms, alone_ms, peak_mib(both, layer.device))
    except torch.OutOfMemoryError:
        print(f"dense at {num_tokens} tokens: out of memory, left blank")
        return Timing()


def measure_row(
    layer: Layer, num_tokens: int, config: LighthouseConfig, dense: Timing, gb_per_s: float, repeats: int
) -> LayerRow:
    """Lighthouse and its floor at one length, beside dense attention; blank where nothing is gained or fits."""
    shape = config.pyramid(num_tokens)
    ours = gathered = Timing()
    stages: dict[str, float] = {}
    if shape.compresses:
        try:
            ours, gathered, stages = measure_lighthouse(layer, num_tokens, config, repeats)
        except torch.OutOfMemoryError:
            print(f"Lighthouse at {num_tokens} tokens: out of memory, left blank")
    least = floor(layer, num_tokens, shape.num_gathered, gathered, gb_per_s)
    return LayerRow(
        num_tokens=num_tokens,
        num_gathered=shape.num_gathered if shape.compresses else None,
        dense_forward_ms=dense.forward_ms,
        lighthouse_forward_ms=ours.forward_ms,
        floor_forward_ms=least.forward_ms,
        dense_ms=dense.both_ms,
        lighthouse_ms=ours.both_ms,
        floor_ms=least.both_ms,
        of_floor=ratio(ours.both_ms, least.both_ms),
        times_dense=ratio(dense.both_ms, ours.both_ms),
        dense_latency_ms=dense.latency_ms,
        lighthouse_latency_ms=ours.latency_ms,
        dense_peak_mib=dense.peak_mib,
        lighthouse_peak_mib=ours.peak_mib,
        gathered_forward_ms=gathered.forward_ms,
        gathered_ms=gathered.both_ms,
        **{f"{name}_us": stages.get(name) for name in STAGES},
        copy_gb_per_s=gb_per_s,
        repeats=repeats,
    )


def measure_lighthouse(
    layer: Layer, num_tokens: int, config: LighthouseConfig, repeats: int
) -> tuple[Timing, Timing, dict[str, float]]:
    """The layer, SDPA alone on its own gathered rows, in turns with it, and the us of each stage."""

    def lighthouse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lighthouse_attention(q, k, v, config, rotation=layer.rotation)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_sdpa(q, k, v, scale=None, backend=config.sdpa)

    sets = input_sets(layer, num_tokens)
    forward, both = passes(lighthouse, sets)
    peak = peak_mib(both, layer.device)
    alone_ms = latency_ms(both, layer.device, min(repeats, FEW))
    forward_alone, both_alone = passes(attend, [_own_rows(inputs, config, layer) for inputs in sets])
    both_ms, gathered_ms = issued_ms([both, both_alone], layer.device, repeats)
    forward_ms, gathered_forward_ms = issued_ms([forward, forward_alone], layer.device, repeats)
    stages = stage_times(sets[0], config, layer, min(repeats, FEW))
    return Timing(forward_ms, both_ms, alone_ms, peak), Timing(gathered_forward_ms, gathered_ms), stages


def stage_times(inputs: list[Tensor], config: LighthouseConfig, layer: Layer, repeats: int) -> dict[str, float]:
    """us of each stage of a layer on the device alone, forward and backward."""
    q, k, v, dout = inputs
    shape = config.pyramid(q.shape[2])
    stages = choose_stages(config, q.device, q.dtype)
    rotation = layer.rotation if config.rotate == "after" else None
    with torch.no_grad():
        scores = score_entries(stages, q, k, v, shape, config, scale=None)
        selection = stages.select(scores, shape, config)
    rows = stages.gather(q, k, v, selection, shape, rotation)
    qs, ks, vs = (x.detach().requires_grad_() for x in rows)
    o = causal_sdpa(qs, ks, vs, scale=None, backend=config.sdpa)
    os = o.detach().requires_grad_()
    out = stages.scatter(os, selection, shape, config)
    (do,) = torch.autograd.grad(out, os, dout, retain_graph=True)
    drows = torch.autograd.grad(o, (qs, ks, vs), do, retain_graph=True)

    def without_grad(stage: Callable[[], object]) -> Run:
        def run(_: int) -> None:
            with torch.no_grad():
                stage()

        return run

    def backward(outputs: Sequence[Tensor], leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> Run:
        return lambda _: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    runs = {
        "score": without_grad(lambda: score_entries(stages, q, k, v, shape, config, scale=None)),
        "select": without_grad(lambda: stages.select(scores, shape, config)),
        "gather": without_grad(lambda: stages.gather(q, k, v, selection, shape, rotation)),
        "attend": lambda _: causal_sdpa(qs, ks, vs, scale=None, backend=config.sdpa),
        "scatter": without_grad(lambda: stages.scatter(os, selection, shape, config)),
        "scatter_backward": backward([out], [os], [dout]),
        "attend_backward": backward([o], [qs, ks, vs], [do]),
        "gather_backward": backward(rows, [q, k, v], drows),
    }
    return {name: device_ms(runs[name], layer.device, repeats) * 1e3 for name in STAGES}


def input_sets(layer: Layer, num_tokens: int) -> list[list[Tensor]]:
    """Several sets of q, k, v, whose gradients are wanted, and a gradient of the output."""
    sets = [make_inputs(layer, num_tokens, seed) for seed in range(INPUT_SETS)]
    for *inputs, _ in sets:
        for x in inputs:
            x.requires_grad_()
    return sets


def _own_rows(inputs: list[Tensor], config: LighthouseConfig, layer: Layer) -> list[Tensor]:
    """The gathered q, k and v of a layer, and the gradient that reaches its attention."""
    q, k, v, dout = inputs
    shape = config.pyramid(q.shape[2])
    stages = choose_stages(config, q.device, q.dtype)
    rotation = layer.rotation if config.rotate == "after" else None
    with torch.no_grad():
        selection = stages.select(score_entries(stages, q, k, v, shape, config, scale=None), shape, config)
        rows = stages.gather(q, k, v, selection, shape, rotation)
        o = causal_sdpa(*rows, scale=None, backend=config.sdpa)
    o.requires_grad_()
    (do,) = torch.autograd.grad(stages.scatter(o, selection, shape, config), o, dout)
    return [*(x.requires_grad_() for x in rows), do]


def passes(attend: Callable[..., Tensor], sets: Sequence[list[Tensor]]) -> tuple[Run, Run]:
    """A forward, and a forward + backward, over the sets of q, k, v and gradient in turn."""

    def forward(turn: int) -> None:
        q, k, v, _ = sets[turn % len(sets)]
        attend(q, k, v)

    def both(turn: int) -> None:
        q, k, v, dout = sets[turn % len(sets)]
        torch.autograd.grad(attend(q, k, v), (q, k, v), dout)

    return forward, both


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
