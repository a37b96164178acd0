"""`lighthouse bench layer --documents KIND ...`: one layer inside packed documents, beside what others offer.

A call is what the first layer of a step does: it makes its `Documents` from lengths, and of them the tables, bounds or
block mask that it needs. Several batches take turns, so that kernels and compiled code serve all of them.
"""

# N tokens, S gathered rows

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

import torch
from torch import Tensor

from lightning_lighthouse.attention import reference
from lightning_lighthouse.attention.backends import choose_stages
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.document_tables import Packing, place_tables
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.documents_lighthouse import settle_documents
from lightning_lighthouse.attention.documents_loop import each_document
from lightning_lighthouse.attention.documents_sdpa import documents_sdpa
from lightning_lighthouse.attention.lighthouse import lighthouse_attention
from lightning_lighthouse.attention.sdpa import causal_sdpa
from lightning_lighthouse.bench.agreement import DocumentAttend, difference, small_case
from lightning_lighthouse.bench.document_estimate import estimate
from lightning_lighthouse.bench.document_kinds import DESCRIPTIONS, draw_sequences
from lightning_lighthouse.bench.layer import Timing, input_sets, measure_dense
from lightning_lighthouse.bench.rivals import FlexDocuments, varlen_documents
from lightning_lighthouse.bench.rows import line, ratio
from lightning_lighthouse.bench.timing import Layer, Run, device_ms, issued_ms, peak_mib, synchronize

# More than what is kept of earlier batches, so that each call meets one that is new to it.
BATCHES = 10
# The layer that is estimated for, in bf16 on CUDA: heads, key/value heads, head dim.
ESTIMATED = (8, 8, 128)
WAYS = ("masked", "lighthouse", "flex", "varlen")
# Calls on the device alone, all batches together
FEW = 10

Offer = Callable[[int], DocumentAttend | None]
Sequences = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class DocumentRow:
    """One layer over sequences of one kind of documents; None where not measured.

    ms of calls issued behind one another and, as device, of one on the device alone, means over the batches; MiB of
    extra memory, the most of them. `dense` goes across documents; `masked` is `documents_sdpa`, `flex` FlexAttention
    with a block mask made in each call, `varlen` torch's `varlen_attn`. `tables` and `flex_mask` are what making the
    tables of Lighthouse takes the host, and the block mask the device and it, once a step for all layers.
    """

    kind: str
    num_tokens: int
    batches: int
    documents: float
    most_documents: int
    length: float
    gathered: float
    dense_batches: int
    dense_forward_ms: float | None
    masked_forward_ms: float | None
    lighthouse_forward_ms: float | None
    flex_forward_ms: float | None
    varlen_forward_ms: float | None
    dense_ms: float | None
    masked_ms: float | None
    lighthouse_ms: float | None
    flex_ms: float | None
    varlen_ms: float | None
    masked_device_ms: float | None
    lighthouse_device_ms: float | None
    flex_device_ms: float | None
    varlen_device_ms: float | None
    tables_ms: float | None
    flex_mask_ms: float | None
    times_masked: float | None
    masked_of_flex: float | None
    masked_of_varlen: float | None
    masked_estimate_ms: float
    lighthouse_estimate_ms: float
    masked_of_estimate: float | None
    lighthouse_of_estimate: float | None
    dense_peak_mib: float | None
    masked_peak_mib: float | None
    lighthouse_peak_mib: float | None
    flex_peak_mib: float | None
    varlen_peak_mib: float | None
    repeats: int


def document_disagreement(layer: Layer, config: LighthouseConfig) -> str | None:
    """How a way of this package differs from a loop over documents on a small case; None where none does."""
    num_tokens, small = small_case(layer.device, replace(config, max_documents=None))
    documents = small_documents(num_tokens, small)
    looped = replace(small, backend="reference", sdpa="auto")
    problem = difference(
        layer,
        num_tokens,
        lambda q, k, v: _lighthouse(layer, small)(q, k, v, documents),
        lambda q, k, v: _lighthouse(layer, looped)(q, k, v, documents),
        # fused attention knows no float64
        lambda q, k, v: _lighthouse(layer, replace(looped, sdpa="math"))(q, k, v, documents),
    )
    if problem is not None:
        return f"Lighthouse inside documents is wrong on {layer.device.type}: {problem}"
    problem = _dense_difference(layer, num_tokens, documents, _masked(config))
    return None if problem is None else f"documents_sdpa is wrong on {layer.device.type}: {problem}"


def small_documents(num_tokens: int, config: LighthouseConfig) -> Documents:
    """Documents of a small case that Lighthouse does not leave dense: long and short ones if possible."""
    short = [3, num_tokens // 14, 17, num_tokens // 6]
    first = num_tokens * 5 // 8
    for lengths in ([first, *short], [first], []):
        documents = Documents([[*lengths, num_tokens - sum(lengths)]])
        if not settle_documents(documents, config):
            break
    return documents


def _dense_difference(layer: Layer, num_tokens: int, documents: Documents, attend: DocumentAttend) -> str | None:
    """How dense attention inside documents is off by more than allowed from a loop over them; None where it is not."""

    def loop(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal_sdpa(q, k, v, scale=None, backend=backend)

        return lambda q, k, v: each_document(one, q, k, v, documents)

    return difference(layer, num_tokens, lambda q, k, v: attend(q, k, v, documents), loop("auto"), loop("math"))


def _masked(config: LighthouseConfig) -> DocumentAttend:
    return lambda q, k, v, documents: documents_sdpa(q, k, v, documents, backend=config.sdpa)


def _lighthouse(layer: Layer, config: LighthouseConfig) -> DocumentAttend:
    return lambda q, k, v, documents: lighthouse_attention(
        q, k, v, config, documents=documents, rotation=layer.rotation
    )


def agreeing_rivals(layer: Layer, config: LighthouseConfig) -> dict[str, Offer]:
    """What others offer, by length, if it agrees with a loop over documents; what does not is said."""
    offers: dict[str, Offer] = {
        "flex": lambda num_tokens: FlexDocuments(layer, num_tokens) if layer.device.type == "cuda" else None,
        "varlen": lambda num_tokens: varlen_documents(layer),
    }
    num_tokens, small = small_case(layer.device, replace(config, max_documents=None))
    documents = small_documents(num_tokens, small)
    agreeing = {}
    for name, offer in offers.items():
        try:
            attend = offer(num_tokens)
            problem = None if attend is None else _dense_difference(layer, num_tokens, documents, attend)
        except (RuntimeError, ValueError) as error:
            problem = str(error).splitlines()[0]
        if problem is None:
            agreeing[name] = offer
        else:
            print(f"{name} inside documents: {problem}, left blank")
    return agreeing


def bench_documents(
    layer: Layer,
    settings: Sequence[tuple[int, LighthouseConfig]],
    kinds: Sequence[str],
    dense_up_to: int | None,
    repeats: int,
) -> Iterator[tuple[LighthouseConfig, DocumentRow]]:
    """Measure one layer inside documents of each kind at each setting and print as it goes.

    Args:
        layer: The layer.
        settings: Lengths, and what Lighthouse is told at each.
        kinds: Names of `document_kinds.KINDS`.
        dense_up_to: Longest sequence for dense attention across documents; None: all.
        repeats: Timed calls of each, at least.

    Yields:
        What Lighthouse was told, its budget resolved, and the row.
    """
    print(
        f"one layer, batch 1, {layer.heads} query and {layer.kv_heads} key/value heads of {layer.head_dim}; "
        f"{BATCHES} batches of each kind in turn\n"
        "ms of a call among calls issued behind one another; each makes Documents and what it needs of them anew\n"
        "dense: across documents; masked: documents_sdpa; flex: FlexAttention, compiled, making its block mask too\n"
        "varlen: torch's varlen_attn, for 16 bits on CUDA with equal heads; gain: masked / Lighthouse\n"
        "length: sum n^2 / N; peak: extra memory in MiB\n"
    )
    for kind in kinds:
        print(f"{kind}: {DESCRIPTIONS[kind]}")
    rivals = agreeing_rivals(layer, settings[0][1])
    print(f"\n{'forward':>65}{'forward + backward':>55}")
    print(line("documents", "N", "a batch", "length", "S / N", *WAYS, "dense", *WAYS, "gain", "/ flex"))
    dense: dict[int, Timing] = {}
    offered: dict[int, dict[str, DocumentAttend]] = {}
    for num_tokens, asked in settings:
        config = replace(asked, top_k=asked.resolve_top_k(num_tokens))
        if num_tokens not in dense:
            is_wanted = dense_up_to is None or num_tokens <= dense_up_to
            dense[num_tokens] = measure_dense(layer, num_tokens, config.sdpa, repeats) if is_wanted else Timing()
            made = {name: offer(num_tokens) for name, offer in rivals.items()}
            offered[num_tokens] = {name: attend for name, attend in made.items() if attend is not None}
        for kind in kinds:
            sequences = list(dict.fromkeys(draw_sequences(kind, num_tokens, BATCHES)))
            ways = {"masked": _masked(config), "lighthouse": _lighthouse(layer, config), **offered[num_tokens]}
            row = measure_row(layer, kind, sequences, config, ways, dense[num_tokens], repeats)
            print("\n".join(_lines(row)), flush=True)
            yield config, row


def measure_row(
    layer: Layer,
    kind: str,
    sequences: Sequences,
    config: LighthouseConfig,
    ways: dict[str, DocumentAttend],
    dense: Timing,
    repeats: int,
) -> DocumentRow:
    """All ways over the same batches in turn; Lighthouse is left blank where it is dense in all of them."""
    num_tokens = sum(sequences[0])
    expected = estimate(sequences, config)
    is_dense = [
        not config.pyramid(num_tokens).compresses or settle_documents(Documents([lengths]), config)
        for lengths in sequences
    ]
    if all(is_dense):
        ways = {name: attend for name, attend in ways.items() if name != "lighthouse"}
    times, device = measure_ways(layer, sequences, ways, repeats)
    masked, ours, flexible, varlen = (times.get(name, Timing()) for name in WAYS)
    is_estimated = layer.device.type == "cuda" and layer.dtype == torch.bfloat16
    is_estimated &= (layer.heads, layer.kv_heads, layer.head_dim) == ESTIMATED
    estimates = (expected.dense_ms, expected.lighthouse_ms) if is_estimated else (None, None)
    flex = ways["flex"] if "flex" in times else None
    return DocumentRow(
        kind=kind,
        num_tokens=num_tokens,
        batches=len(sequences),
        documents=expected.documents,
        most_documents=expected.most_documents,
        length=expected.length,
        gathered=expected.gathered,
        dense_batches=sum(is_dense),
        dense_forward_ms=dense.forward_ms,
        masked_forward_ms=masked.forward_ms,
        lighthouse_forward_ms=ours.forward_ms,
        flex_forward_ms=flexible.forward_ms,
        varlen_forward_ms=varlen.forward_ms,
        dense_ms=dense.both_ms,
        masked_ms=masked.both_ms,
        lighthouse_ms=ours.both_ms,
        flex_ms=flexible.both_ms,
        varlen_ms=varlen.both_ms,
        **{f"{name}_device_ms": device.get(name) for name in WAYS},
        tables_ms=None if all(is_dense) else tables_ms(layer, sequences, config),
        flex_mask_ms=mask_ms(layer, sequences, flex, repeats) if isinstance(flex, FlexDocuments) else None,
        times_masked=ratio(masked.both_ms, ours.both_ms),
        masked_of_flex=ratio(masked.both_ms, flexible.both_ms),
        masked_of_varlen=ratio(masked.both_ms, varlen.both_ms),
        masked_estimate_ms=expected.dense_ms,
        lighthouse_estimate_ms=expected.lighthouse_ms,
        masked_of_estimate=ratio(masked.both_ms, estimates[0]),
        lighthouse_of_estimate=ratio(ours.both_ms, estimates[1]),
        dense_peak_mib=dense.peak_mib,
        masked_peak_mib=masked.peak_mib,
        lighthouse_peak_mib=ours.peak_mib,
        flex_peak_mib=flexible.peak_mib,
        varlen_peak_mib=varlen.peak_mib,
        repeats=repeats,
    )


def measure_ways(
    layer: Layer, sequences: Sequences, ways: dict[str, DocumentAttend], repeats: int
) -> tuple[dict[str, Timing], dict[str, float]]:
    """The ways in turns, and the ms of each on the device alone; who cannot run is left out, and said why."""
    num_tokens, count = sum(sequences[0]), len(sequences)
    sets = input_sets(layer, num_tokens)
    runs, peaks, device = {}, {}, {}
    for name, attend in ways.items():
        forward, both = document_passes(attend, sets, sequences)
        try:
            both_of_all = all_of(both, count)
            # compiles, and plans for every batch
            both_of_all(0)
            peaks[name] = peak_mib(both_of_all, layer.device)
            if layer.device.type == "cuda":
                device[name] = mean_device_ms(both, layer, count)
            runs[name] = all_of(forward, count), both_of_all
        except (RuntimeError, ValueError) as error:
            if name in ("masked", "lighthouse") and not isinstance(error, torch.OutOfMemoryError):
                raise
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error).splitlines()[0]
            print(f"{name} at {num_tokens} tokens: {reason}, left blank")
    each = math.ceil(repeats / count)
    forward_ms = issued_ms([forward for forward, _ in runs.values()], layer.device, each)
    both_ms = issued_ms([both for _, both in runs.values()], layer.device, each)
    times = zip(runs, forward_ms, both_ms, strict=True)
    return {name: Timing(forward / count, both / count, peak_mib=peaks[name]) for name, forward, both in times}, device


def document_passes(attend: DocumentAttend, sets: Sequence[list[Tensor]], sequences: Sequences) -> tuple[Run, Run]:
    """A forward, and a forward + backward, of one batch after the other, each told of its documents by lengths."""

    def forward(turn: int) -> Tensor:
        q, k, v, _ = sets[turn % len(sets)]
        return attend(q, k, v, Documents([sequences[turn % len(sequences)]]))

    def both(turn: int) -> None:
        q, k, v, dout = sets[turn % len(sets)]
        torch.autograd.grad(forward(turn), (q, k, v), dout)

    return forward, both


def all_of(run: Run, count: int) -> Run:
    """`run` over all batches, so that each way is timed on the same ones."""

    def runs(_: int) -> None:
        for turn in range(count):
            run(turn)

    return runs


def mean_device_ms(run: Run, layer: Layer, count: int) -> float:
    """ms on the device alone, a batch at a time: many documents are many launches, of which few can wait."""

    def only(turn: int) -> Run:
        return lambda _: run(turn)

    return mean(device_ms(only(turn), layer.device, math.ceil(FEW / count)) for turn in range(count))


def tables_ms(layer: Layer, sequences: Sequences, config: LighthouseConfig) -> float | None:
    """Median ms that the host needs for the tables of a batch; None where a loop needs none."""
    if choose_stages(config, layer.device, layer.dtype) is reference:
        return None
    num_tokens = sum(sequences[0])
    most = config.resolve_max_documents(num_tokens)
    packing = Packing.of(config.pyramid(num_tokens), 1, most, config.selection)
    times = []
    for turn in range(2 * len(sequences)):
        synchronize(layer.device)
        start = time.perf_counter()
        documents = Documents([sequences[turn % len(sequences)]])
        if not settle_documents(documents, config):
            place_tables(documents.host, packing, layer.device)
            times.append((time.perf_counter() - start) * 1e3)
    return median(times)


def mask_ms(layer: Layer, sequences: Sequences, flex: FlexDocuments, repeats: int) -> float:
    """ms of making FlexAttention's block mask, issued behind one another."""
    count = len(sequences)
    run = all_of(lambda turn: flex.block_mask(Documents([sequences[turn]])), count)
    return issued_ms([run], layer.device, math.ceil(repeats / count))[0] / count


def _lines(row: DocumentRow) -> Iterator[str]:
    forward = (row.masked_forward_ms, row.lighthouse_forward_ms, row.flex_forward_ms, row.varlen_forward_ms)
    both = (row.masked_ms, row.lighthouse_ms, row.flex_ms, row.varlen_ms)
    sizes = (row.kind, row.num_tokens, row.documents, row.length, row.gathered)
    yield line(*sizes, *forward, row.dense_ms, *both, row.times_masked, row.masked_of_flex)
    if row.dense_batches:
        yield (
            f"{'':>10} Lighthouse runs dense inside the documents of {row.dense_batches} of {row.batches} batches: "
            f"too many or too short ones ({row.most_documents} at most)"
        )
    yield f"{'':>10} estimated: masked {_estimated(row.masked_estimate_ms, row.masked_of_estimate)}, " + (
        f"Lighthouse {_estimated(row.lighthouse_estimate_ms, row.lighthouse_of_estimate)}"
    )
    device = {name: getattr(row, f"{name}_device_ms") for name in WAYS}
    more = {"tables, host": row.tables_ms, "block mask": row.flex_mask_ms}
    times = [f"{name} {ms:.3g}" for name, ms in (device | more).items() if ms is not None]
    peaks = {name: getattr(row, f"{name}_peak_mib") for name in ("dense", *WAYS)}
    memory = [f"{name} {mib:,.0f}" for name, mib in peaks.items() if mib is not None]
    if memory:
        yield f"{'':>10} device alone: {', '.join(times)} ms; peak: {', '.join(memory)} MiB"


def _estimated(ms: float, share: float | None) -> str:
    return f"{ms:.3g} ms" if share is None else f"{ms:.3g} ms (measured {share:.2f} times that)"
