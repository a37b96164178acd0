"""`lighthouse bench layer --type window|chunk`: one layer of local attention beside dense and what others offer."""

# N tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lighthouse.attention.reference import window_mask, window_reference
from lightning_lighthouse.attention.windows import chunk_attention, window_attention
from lightning_lighthouse.bench.agreement import Attend, difference, small_length
from lightning_lighthouse.bench.layer import Timing, input_sets, measure_dense, passes
from lightning_lighthouse.bench.rivals import flex, varlen_attention
from lightning_lighthouse.bench.rows import line, ratio
from lightning_lighthouse.bench.timing import Layer, issued_ms, peak_mib


@dataclass(frozen=True)
class WindowSetting:
    """Local attention to measure: windows with sinks, or chunks, in tokens."""

    type: str
    window: int
    sink_tokens: int
    sdpa: str

    @property
    def attend(self) -> Attend:
        """The attention of this package."""
        if self.type == "chunk":
            return partial(chunk_attention, window=self.window, sdpa=self.sdpa)
        return partial(window_attention, window=self.window, sink_tokens=self.sink_tokens, sdpa=self.sdpa)


@dataclass(frozen=True)
class WindowRow:
    """One layer at one length; None where not measured.

    ms of calls issued behind one another, MiB of extra memory. `layer` is this package's, `varlen` torch's
    `varlen_attn` (without sinks), `flex` FlexAttention, compiled, with its block mask made before.
    """

    num_tokens: int
    dense_forward_ms: float | None
    layer_forward_ms: float | None
    varlen_forward_ms: float | None
    flex_forward_ms: float | None
    dense_ms: float | None
    layer_ms: float | None
    varlen_ms: float | None
    flex_ms: float | None
    of_varlen: float | None
    of_flex: float | None
    times_dense: float | None
    dense_peak_mib: float | None
    layer_peak_mib: float | None
    varlen_peak_mib: float | None
    flex_peak_mib: float | None
    repeats: int


def window_disagreement(layer: Layer, setting: WindowSetting) -> str | None:
    """How the layer differs from its reference on a small case; None where it does not."""
    num_tokens = small_length(layer.device)
    # dq of a window of one token is nothing, and nothing can be compared with it
    small = replace(setting, window=max(2, min(setting.window, num_tokens // 2)))

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if small.type == "window":
            return window_reference(q, k, v, small.window, sink_tokens=small.sink_tokens)
        parts = zip(q.split(small.window, 2), k.split(small.window, 2), v.split(small.window, 2), strict=True)
        return torch.cat([window_reference(*part, window=small.window) for part in parts], 2)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if small.type == "window":
            mask = window_mask(num_tokens, small.window, small.sink_tokens, q.device)
        else:
            token = torch.arange(num_tokens, device=q.device)
            chunk = token // small.window
            mask = (token[:, None] >= token) & (chunk[:, None] == chunk)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    # on a CPU a layer is stock SDPA, whose error in float32 is up to three times the reference's
    fused = masked if layer.device.type == "cpu" else None
    problem = difference(layer, num_tokens, small.attend, reference, reference, fused=fused)
    return None if problem is None else f"{small.type} {small.window} is wrong on {layer.device.type}: {problem}"


def bench_windows(
    layer: Layer, settings: Sequence[tuple[int, WindowSetting]], dense_up_to: int | None, repeats: int
) -> Iterator[tuple[WindowSetting, WindowRow]]:
    """Measure one layer of local attention at each setting and print as it goes.

    Args:
        layer: The layer.
        settings: Lengths, and the attention at each.
        dense_up_to: Longest sequence for dense attention; None: all.
        repeats: Timed calls of each, at least.

    Yields:
        The attention and the row.
    """
    print(
        f"one layer, batch 1, {layer.heads} query and {layer.kv_heads} key/value heads of {layer.head_dim}\n"
        "ms of a call among calls issued behind one another, in turns; peak: extra memory in MiB\n"
        "varlen: torch's varlen_attn, for 16 bits on CUDA with equal heads, without sinks\n"
        "flex: FlexAttention, compiled, on CUDA; its block mask is made outside of the times\n"
    )
    print(f"{'forward':>65}{'forward + backward':>44}{'peak':>77}")
    columns = ("dense", "layer", "varlen", "flex")
    print(line("N", settings[0][1].type, "sinks", *columns, *columns, "/ varlen", "/ flex", "gain", *columns))
    dense: dict[int, Timing] = {}
    for num_tokens, setting in settings:
        if num_tokens not in dense:
            is_wanted = dense_up_to is None or num_tokens <= dense_up_to
            dense[num_tokens] = measure_dense(layer, num_tokens, setting.sdpa, repeats) if is_wanted else Timing()
        row = measure_row(layer, num_tokens, setting, dense[num_tokens], repeats)
        forward = (row.dense_forward_ms, row.layer_forward_ms, row.varlen_forward_ms, row.flex_forward_ms)
        both = (row.dense_ms, row.layer_ms, row.varlen_ms, row.flex_ms)
        peaks = (row.dense_peak_mib, row.layer_peak_mib, row.varlen_peak_mib, row.flex_peak_mib)
        ratios = (row.of_varlen, row.of_flex, row.times_dense)
        print(line(num_tokens, setting.window, setting.sink_tokens, *forward, *both, *ratios, *peaks), flush=True)
        yield setting, row


def measure_row(layer: Layer, num_tokens: int, setting: WindowSetting, dense: Timing, repeats: int) -> WindowRow:
    """Local attention at one length, beside dense attention and the others; blank where it is dense attention."""
    times = {"layer": Timing(), "varlen": Timing(), "flex": Timing()}
    if setting.window + setting.sink_tokens < num_tokens:
        times |= measure_local(layer, num_tokens, setting, repeats)
    ours, varlen, flexible = times["layer"], times["varlen"], times["flex"]
    return WindowRow(
        num_tokens=num_tokens,
        dense_forward_ms=dense.forward_ms,
        layer_forward_ms=ours.forward_ms,
        varlen_forward_ms=varlen.forward_ms,
        flex_forward_ms=flexible.forward_ms,
        dense_ms=dense.both_ms,
        layer_ms=ours.both_ms,
        varlen_ms=varlen.both_ms,
        flex_ms=flexible.both_ms,
        of_varlen=ratio(ours.both_ms, varlen.both_ms),
        of_flex=ratio(ours.both_ms, flexible.both_ms),
        times_dense=ratio(dense.both_ms, ours.both_ms),
        dense_peak_mib=dense.peak_mib,
        layer_peak_mib=ours.peak_mib,
        varlen_peak_mib=varlen.peak_mib,
        flex_peak_mib=flexible.peak_mib,
        repeats=repeats,
    )


def measure_local(layer: Layer, num_tokens: int, setting: WindowSetting, repeats: int) -> dict[str, Timing]:
    """The layer and what others offer, in turns; who cannot run is left out, and said why."""
    candidates: dict[str, Callable[[], Attend | None]] = {
        "layer": lambda: setting.attend,
        "varlen": lambda: varlen_attention(layer, num_tokens, setting.type, setting.window),
        "flex": lambda: flex(layer, num_tokens, setting.type, setting.window, setting.sink_tokens),
    }
    sets = input_sets(layer, num_tokens)
    runs, peaks = {}, {}
    for name, offer in candidates.items():
        try:
            attend = offer()
            if attend is None:
                continue
            forward, both = passes(attend, sets)
            # compiles too
            peaks[name] = peak_mib(both, layer.device)
            both(0)
            runs[name] = forward, both
        except (RuntimeError, ValueError) as error:
            if name == "layer" and not isinstance(error, torch.OutOfMemoryError):
                raise
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error).splitlines()[0]
            print(f"{name} at {num_tokens} tokens: {reason}, left blank")
    forward_ms = issued_ms([forward for forward, _ in runs.values()], layer.device, repeats)
    both_ms = issued_ms([both for _, both in runs.values()], layer.device, repeats)
    times = zip(runs, forward_ms, both_ms, strict=True)
    return {name: Timing(forward, both, peak_mib=peaks[name]) for name, forward, both in times}
