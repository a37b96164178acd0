"""Windows on one GPU: correct first, then beside varlen_attn, compiled FlexAttention and dense cuDNN, in one run.

    PYTHONPATH=. python experiments/windows_gpu.py windows.csv

B 1, 8 query and key/value heads of 128, bf16, laid out as a model does. ms are medians of calls issued behind one
another, taken in turns; peak is the extra memory of one forward + backward. A row that fails says so and is left out.
"""

from __future__ import annotations

import csv
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lightning_lighthouse.attention.reference import window_reference
from lightning_lighthouse.attention.sdpa import causal_sdpa
from lightning_lighthouse.attention.windows import chunk_attention, window_attention
from lightning_lighthouse.bench.timing import Layer, issued_ms, make_inputs, peak_mib

DEVICE = torch.device("cuda")
LAYER = Layer(heads=8, kv_heads=8, head_dim=128, dtype=torch.bfloat16, device=DEVICE)
LENGTHS = (32_768, 98_304, 524_288)
WINDOWS = (512, 1_024, 4_096)
# beyond this a dense call alone would take the time of all others
DENSE_UP_TO = 98_304
SINKS = 4
REPEATS = 20
# FlexAttention is compiled anew for every row; the last rows do without it rather than run on
DEADLINE_S = 210
FLEX_BLOCK = 128

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> int:
    path = Path(sys.argv[1])
    started = time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cudnn {torch.backends.cudnn.version()}")
    wrong = check()
    print(f"{wrong} checks failed, {time.perf_counter() - started:.0f} s\n", flush=True)
    rows = list(measure(started))
    if rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    profile()
    print(f"{time.perf_counter() - started:.0f} s")
    return 1 if wrong else 0


def check() -> int:
    """Output and gradients against float64: at most twice the error of naive attention in the same dtype."""
    sizes = [
        (2, 8, 8, 2003, 128),
        (2, 8, 2, 2003, 64),
        (1, 4, 1, 1024, 128),
        (1, 3, 3, 1031, 100),
        (1, 2, 1, 1031, 256),
    ]
    cases = [
        (*size, window, sinks, torch.bfloat16) for size in sizes for window in (1, 63, 512) for sinks in (0, 4, 37)
    ]
    cases += [(2, 8, 2, 2003, 64, window, 4, torch.bfloat16) for window in (2, 1998, 1999, 2002, 2003, 5000)]
    cases += [(1, 2, 1, 1031, 320, 63, 4, torch.bfloat16), (2, 8, 8, 1031, 64, 63, 0, torch.float16)]
    cases += [(2, 4, 2, 1031, 64, window, sinks, torch.float32) for window in (1, 63, 512) for sinks in (0, 4)]
    checks: list[tuple[str, Callable[[], str | None]]] = [
        (f"window {'B H G N D W sinks'}: {case}", partial(check_window, *case)) for case in cases
    ]
    checks += [
        ("fused qkv memory", partial(check_window, 2, 4, 4, 1031, 64, 63, 4, torch.bfloat16, fused=True)),
        ("rows that begin anywhere", partial(check_window, 2, 4, 4, 1031, 64, 63, 4, torch.bfloat16, shifted=True)),
        ("chunks", check_chunk),
        ("bit for bit where asked", check_repeats),
        ("causal bit for bit", check_causal),
        ("one graph", check_compiled),
        ("no synchronisation", check_no_sync),
    ]
    wrong = 0
    for name, run in checks:
        try:
            problem = run()
        except Exception:
            problem = traceback.format_exc(limit=-3)
        if problem:
            wrong += 1
            print(f"WRONG {name}: {problem}")
    print(f"{len(checks)} checks")
    return wrong


def check_window(
    batch: int, heads: int, groups: int, tokens: int, dim: int, window: int, sinks: int, dtype: torch.dtype,
    fused: bool = False, shifted: bool = False,
) -> str | None:  # fmt: skip
    """What is wrong with output or gradients; None: nothing."""
    generator = torch.Generator(DEVICE).manual_seed(42)
    draw = partial(torch.randn, device=DEVICE, generator=generator)
    if fused:
        leaves = list(draw(batch, tokens, 3, heads, dim).to(dtype).unbind(2))
    else:
        leaves = [
            draw(batch, tokens, count, dim + shifted).to(dtype)[..., shifted:] for count in (heads, groups, groups)
        ]
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in leaves]
    dout = draw(batch, heads, tokens, dim).to(dtype)

    def results(attend: Attend, dtype: torch.dtype) -> list[Tensor]:
        qkv = [x.detach().to(dtype).requires_grad_() for x in leaves] if dtype != leaves[0].dtype else leaves
        out = attend(*qkv)
        return [x.double() for x in (out, *torch.autograd.grad(out, qkv, dout.to(dtype)))]

    reference = partial(window_reference, window=window, sink_tokens=sinks)
    exact, naive = results(reference, torch.float64), results(reference, dtype)
    ours = results(lambda q, k, v: window_attention(q, k, v, window, sink_tokens=sinks), dtype)
    return worst(ours, naive, exact, torch.finfo(dtype).eps)


def worst(ours: list[Tensor], naive: list[Tensor], exact: list[Tensor], eps: float) -> str | None:
    problems = []
    for name, value, twin, truth in zip(("out", "dq", "dk", "dv"), ours, naive, exact, strict=True):
        # where the truth is nothing, as dq of a window of one token, terms of the size of dv cancel out
        size = truth.norm() if truth.norm() > 1e-9 * exact[3].norm() else exact[3].norm()
        error, allowed = ((value - truth).norm() / size).item(), (2 * (twin - truth).norm() / size).item() + eps
        # written so that a NaN fails
        if not error <= allowed:
            problems.append(f"{name} off by {error:.3g}, {allowed:.3g} allowed")
    return "; ".join(problems) or None


def inputs(tokens: int, heads: int = 8, groups: int = 8) -> tuple[list[Tensor], Tensor]:
    *qkv, dout = make_inputs(Layer(heads, groups, 128, torch.bfloat16, DEVICE), tokens, seed=42)
    return [x.requires_grad_() for x in qkv], dout


def check_chunk() -> str | None:
    for tokens, window in ((4096, 512), (4099, 512), (300, 4)):
        (q, k, v), dout = inputs(tokens, 8, 2)
        chunk = torch.arange(tokens, device=DEVICE) // window
        mask = (chunk[:, None] == chunk) & torch.ones_like(chunk[:, None] == chunk).tril()

        def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
            k, v = (x.repeat_interleave(4, 1) for x in (k, v))
            return (q @ k.mT * 128**-0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v

        def results(attend: Attend, qkv: list[Tensor], dout: Tensor = dout) -> list[Tensor]:
            out = attend(*qkv)
            return [x.double() for x in (out, *torch.autograd.grad(out, qkv, dout.to(out.dtype)))]

        exact = results(reference, [x.detach().double().requires_grad_() for x in (q, k, v)])
        ours = results(partial(chunk_attention, window=window), [q, k, v])
        problem = worst(ours, results(reference, [q, k, v]), exact, torch.finfo(q.dtype).eps)
        if problem:
            return f"{tokens} tokens, {window}: {problem}"
    return None


def check_repeats() -> str | None:
    torch.use_deterministic_algorithms(True)
    try:
        qkv, dout = inputs(8_209, 8, 2)
        runs = []
        for _ in range(4):
            out = window_attention(*qkv, 512, sink_tokens=4)
            runs.append((out, *torch.autograd.grad(out, qkv, dout)))
    finally:
        torch.use_deterministic_algorithms(False)
    same = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    return None if same else "runs differ"


def check_causal() -> str | None:
    (q, k, v), _ = inputs(4_099)
    at = 2_500
    changed = [torch.cat((x[:, :, : at + 1], torch.randn_like(x[:, :, at + 1 :])), 2) for x in (q, k, v)]
    for sinks in (0, 4):
        before, after = (window_attention(*x, 512, sink_tokens=sinks) for x in ((q, k, v), changed))
        if not torch.equal(before[:, :, : at + 1], after[:, :, : at + 1]):
            return f"{sinks} sinks: an output depends on a later token"
    return None


def check_compiled() -> str | None:
    qkv, dout = inputs(4_099, 8, 2)
    attend = partial(window_attention, window=512, sink_tokens=4)
    results = []
    for call in (attend, torch.compile(attend, fullgraph=True)):
        out = call(*qkv)
        results.append((out, *torch.autograd.grad(out, qkv, dout)))
    if not torch.equal(results[0][0], results[1][0]) or results[0][0].stride() != results[1][0].stride():
        return "the compiled output differs"
    # the kernel sums dq in any order
    far = [(a - b).abs().max().item() for a, b in zip(*results, strict=True)]
    return f"gradients differ by {far}" if max(far) > 0.1 else None


def check_no_sync() -> str | None:
    qkv, dout = inputs(4_099, 8, 2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(window_attention(*qkv, 512, sink_tokens=4), qkv, dout)
        torch.autograd.grad(chunk_attention(*qkv, 512), qkv, dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def measure(started: float) -> Iterator[dict[str, Any]]:
    """A row for every length, window and attention."""
    print(f"{'N':>8}{'window':>8}  {'attention':<22}{'fwd ms':>9}{'both ms':>9}{'/ varlen':>9}{'peak MiB':>10}")
    for tokens in LENGTHS:
        qkv, dout = inputs(tokens)
        dense = {"dense cuDNN": partial(causal_sdpa, scale=None, backend="cudnn")} if tokens <= DENSE_UP_TO else {}
        yield from measure_rows(tokens, None, dense, qkv, dout)
        for window in WINDOWS:
            attentions: dict[str, Attend] = {
                "ours": partial(window_attention, window=window),
                f"ours, {SINKS} sinks": partial(window_attention, window=window, sink_tokens=SINKS),
                "varlen_attn": varlen(tokens, window),
                "chunks": partial(chunk_attention, window=window),
            }
            if time.perf_counter() - started < DEADLINE_S:
                attentions["flex, compiled"] = flex(tokens, window)
            yield from measure_rows(tokens, window, attentions, qkv, dout)
        del qkv, dout


def measure_rows(
    tokens: int, window: int | None, attentions: dict[str, Attend], qkv: list[Tensor], dout: Tensor
) -> Iterator[dict[str, Any]]:
    def both(attend: Attend, _: int) -> None:
        torch.autograd.grad(attend(*qkv), qkv, dout)

    peaks = {}
    for name, attend in list(attentions.items()):
        try:
            peaks[name] = peak_mib(partial(both, attend), DEVICE)
        except Exception as error:
            print(f"{tokens:>8,}{window or '':>8}  {name:<22}failed: {str(error).splitlines()[0][:150]}")
            del attentions[name]
    forward_ms = issued_ms([lambda _, attend=attend: attend(*qkv) for attend in attentions.values()], DEVICE, REPEATS)
    both_ms = issued_ms([partial(both, attend) for attend in attentions.values()], DEVICE, REPEATS)
    times = dict(zip(attentions, zip(forward_ms, both_ms, strict=True), strict=True))
    for name, (forward, total) in times.items():
        ratio = total / times["varlen_attn"][1] if "varlen_attn" in times else None
        text = "" if ratio is None else f"{ratio:.3f}"
        where = f"{tokens:>8,}{window or '':>8}"
        print(f"{where}  {name:<22}{forward:>9.3f}{total:>9.3f}{text:>9}{peaks[name]:>10,.0f}", flush=True)
        yield {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "num_tokens": tokens, "window": window,
            "attention": name, "forward_ms": forward, "both_ms": total, "of_varlen": ratio, "peak_mib": peaks[name],
        }  # fmt: skip


def varlen(tokens: int, window: int) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x[0].transpose(0, 1) for x in (q, k, v))
        out = varlen_attn(*rows, bounds, bounds, tokens, tokens, window_size=(window - 1, 0))
        return out.transpose(0, 1).unsqueeze(0)

    return attend


def flex(tokens: int, window: int) -> Attend:
    # one more than Dynamo recompiles
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = window_blocks(tokens, window, DEVICE)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def window_blocks(tokens: int, window: int, device: torch.device) -> BlockMask:
    """The block mask of a window, without the N x N mask that torch would compute it from."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    block = torch.arange(tokens // FLEX_BLOCK, device=device)
    distance = (block[:, None] - block) * FLEX_BLOCK
    is_full = (distance > 0) & (distance + FLEX_BLOCK - 1 < window)
    is_partial = (distance >= 0) & (distance - FLEX_BLOCK + 1 < window) & ~is_full
    tables = []
    for chosen in (is_partial, is_full):
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)
        tables += [chosen.sum(-1)[None, None].int(), order[None, None].int()]
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees)


def profile() -> None:
    """Where the time of a window with sinks goes, by kernel."""
    qkv, dout = inputs(98_304)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        for sinks, _ in product((0, SINKS), range(2)):
            with torch.profiler.profile(activities=activities) as trace:
                torch.autograd.grad(window_attention(*qkv, 1_024, sink_tokens=sinks), qkv, dout)
                torch.cuda.synchronize()
        for event in sorted(trace.key_averages(), key=lambda event: -event.device_time_total)[:12]:
            print(f"{event.device_time_total / 1e3:>9.3f} ms {event.count:>3}  {event.key[:120]}")
    except Exception as error:
        print(f"profile failed: {error}")


if __name__ == "__main__":
    sys.exit(main())
