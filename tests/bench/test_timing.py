"""How `lighthouse bench` measures: what counts, on which inputs, in which order; the floor and the crossover."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lighthouse.attention import lighthouse as attention
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.bench import layer as bench_layer
from lightning_lighthouse.bench import timing as bench_timing
from lightning_lighthouse.bench.layer import STAGES, Timing, floor, measure_lighthouse, stage_times
from lightning_lighthouse.bench.table import crossover
from lightning_lighthouse.bench.timing import Layer, issued_ms, latency_ms, make_inputs

CPU = torch.device("cpu")
LAYER = Layer(heads=3, kv_heads=1, head_dim=16, dtype=torch.float32, device=CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is used on machines without a GPU only")
def test_the_stages_of_the_kernels_are_timed() -> None:
    layer = replace(LAYER, heads=1, head_dim=8)
    (inputs, _) = bench_layer.input_sets(layer, 37)
    times = stage_times(inputs, LighthouseConfig(2, 4, 2, backend="triton", selection="published"), layer, repeats=1)
    assert list(times) == list(STAGES)
    assert all(us > 0 for us in times.values())


@pytest.mark.parametrize("selection", ["published", "strided"])
def test_the_floor_attends_to_the_rows_of_the_layer(selection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed alone, SDPA gets the very q, k, v and gradient that it gets inside the layer."""
    config = LighthouseConfig(3, 2, 8, selection=selection)
    seen: dict[int, list[tuple[float, ...]]] = {}

    def watch(runs: Any, device: Any, repeats: int) -> list[float]:
        for number, run in enumerate(runs):
            calls = seen.setdefault(number, [])

            def spy(q: Tensor, k: Tensor, v: Tensor, calls: Any = calls, **settings: Any) -> Tensor:
                out = stock(q, k, v, **settings)
                sums = tuple(float(x.detach().double().sum()) for x in (q, k, v, out))
                if out.requires_grad:
                    out.register_hook(lambda gradient: calls.append((*sums, float(gradient.double().sum()))))
                return out

            monkeypatch.setattr(attention, "causal_sdpa", spy)
            monkeypatch.setattr(bench_layer, "causal_sdpa", spy)
            run(0)
            run(1)
            monkeypatch.setattr(attention, "causal_sdpa", stock)
            monkeypatch.setattr(bench_layer, "causal_sdpa", stock)
        return [1.0] * len(runs)

    stock = attention.causal_sdpa
    monkeypatch.setattr(bench_layer, "issued_ms", watch)
    measure_lighthouse(LAYER, 131, config, 1)
    assert len(seen[0]) == 2
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[0][1]


def test_inputs_are_views_as_a_model_makes_them() -> None:
    q, k, v, weight = make_inputs(LAYER, 11, seed=1)
    assert [tuple(x.shape) for x in (q, k, v, weight)] == [
        (1, 3, 11, 16),
        (1, 1, 11, 16),
        (1, 1, 11, 16),
        (1, 3, 11, 16),
    ]
    assert q.transpose(1, 2).is_contiguous()
    assert not torch.equal(q, weight)
    assert torch.equal(make_inputs(LAYER, 11, seed=1)[0], q)


def test_inputs_take_turns_and_backward_is_part_of_the_second_time() -> None:
    seen, gradients = [], []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q.data_ptr())
        out = q * k * v
        out.register_hook(gradients.append)
        return out

    forward, both = bench_layer.passes(attend, bench_layer.input_sets(LAYER, 7))
    issued_ms([forward, both], CPU, repeats=5)
    assert len(set(seen)) == 2
    # the warm-up, one call for an estimate, five rounds of one call
    calls = bench_timing.WARMUP_RUNS + 1 + 5
    assert len(seen) == 2 * calls
    assert len(gradients) == calls


def test_calls_behind_one_another_are_counted_without_the_warm_up_and_in_turns() -> None:
    order: list[str] = []
    pauses = {"a": iter([0.03] * 4 + [0.002, 0.03, 0.002, 0.002, 0.03]), "b": iter([0.03] * 4 + [0.006] * 5)}

    def run(name: str) -> Any:
        return lambda turn: order.append(name) or time.sleep(next(pauses[name]))

    a, b = issued_ms([run("a"), run("b")], CPU, repeats=5)
    assert 2 <= a < 25
    assert 6 <= b < 25
    assert order[-10:] == ["a", "b"] * 5


def test_one_call_alone_is_the_median_of_what_comes_after_the_warm_up() -> None:
    calls = iter([0.03] * 3 + [0.002, 0.03, 0.002, 0.002, 0.03])
    assert 2 <= latency_ms(lambda turn: time.sleep(next(calls)), CPU, repeats=5) < 25


def test_floor_is_attention_and_every_row_once() -> None:
    """8 N-rows and 8 S-rows of H D forward and backward with equal heads, half of them forward."""
    layer = Layer(heads=8, kv_heads=8, head_dim=128, dtype=torch.bfloat16, device=CPU)
    num_tokens, num_gathered = 98_304, 18_432
    least = floor(layer, num_tokens, num_gathered, Timing(1.28, 4.66), 4300.0)
    moved_ms = 8 * (num_tokens + num_gathered) * 8 * 128 * 2 / 4.3e12 * 1e3
    assert least.both_ms == pytest.approx(4.66 + moved_ms)
    assert least.forward_ms == pytest.approx(1.28 + moved_ms / 2)
    # the figure that the project's targets give for an H200
    assert least.both_ms == pytest.approx(5.10, abs=0.01)
    grouped = replace(layer, kv_heads=2)
    assert grouped.moved_bytes(1) * 16 == layer.moved_bytes(1) * 10
    assert floor(layer, 10, 5, Timing(), 1.0) == Timing()


@given(
    exponents=st.tuples(st.floats(1.5, 2.5), st.floats(0.5, 1.2)),
    crossing=st.floats(600, 60_000),
    lengths=st.lists(st.integers(64, 10**6), min_size=2, max_size=9, unique=True),
)
def test_crossover_of_power_laws_is_found_exactly(
    exponents: tuple[float, float], crossing: float, lengths: list[int]
) -> None:
    lengths = sorted(lengths)
    points = [(n, (n / crossing) ** exponents[0], (n / crossing) ** exponents[1]) for n in lengths]
    measured, estimate = crossover(points)
    winning = [n for n in lengths if n > crossing]
    assert measured == (winning[0] if winning else None)
    if winning and winning[0] != lengths[0]:
        assert estimate == pytest.approx(crossing, rel=1e-6)
    else:
        assert estimate is None
