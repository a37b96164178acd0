"""`lighthouse bench`: it refuses a wrong backend, measures what it says, and leaves blank what it did not measure."""

from __future__ import annotations

import csv
import math
import re
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback
from torch import Tensor

from lightning_lighthouse import attention, bench, bench_timing, patch, reference
from lightning_lighthouse.bench_timing import (
    Layer,
    Timing,
    crossover,
    disagreement,
    floor,
    make_inputs,
    measure,
    measure_steps,
    median_ms,
)
from lightning_lighthouse.config import LighthouseConfig

CPU = torch.device("cpu")
LAYER = Layer(heads=3, kv_heads=1, head_dim=16, dtype=torch.float32, device=CPU)
# small and quick; 97 tokens are too few to compress, 521 are not
ARGUMENTS = [
    "--device",
    "cpu",
    "--heads",
    "3",
    "--kv-heads",
    "1",
    "--head-dim",
    "16",
    "--repeats",
    "2",
    "--lengths",
    "521",
    "97",
]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_layer_is_measured_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    assert bench.main([*ARGUMENTS, "--csv", str(path)]) == 0
    assert bench.main([*ARGUMENTS, "--csv", str(path)]) == 0
    rows = read_rows(path)
    assert [row["num_tokens"] for row in rows] == ["97", "521", "97", "521"]
    short, long = rows[2:]
    for name in ("dense_forward_ms", "dense_ms", "lighthouse_forward_ms", "lighthouse_ms", "floor_ms", "gathered_ms"):
        assert float(long[name]) > 0, name
    assert long["num_gathered"] == str(LighthouseConfig().pyramid(521).num_gathered)
    assert float(long["gathered_ms"]) < float(long["floor_ms"])
    # dense attention ran at 97 tokens, so there is nothing to say about Lighthouse; and a CPU's memory is not measured
    assert float(short["dense_ms"]) > 0
    blank = ("lighthouse_ms", "lighthouse_forward_ms", "floor_ms", "num_gathered", "dense_peak_mib")
    assert [short[name] for name in blank] == [""] * len(blank)
    assert long["torch"] == torch.__version__
    assert (long["heads"], long["kv_heads"], long["head_dim"], long["dtype"]) == ("3", "1", "16", "float32")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", long["date"])

    shown = capsys.readouterr().out
    assert "on a CPU" in shown
    assert "floor: SDPA on the S gathered entries alone + 16 N-rows and 16 S-rows of 16" in shown
    assert "forward + backward: Lighthouse" in shown


def test_dense_attention_stays_blank_above_its_length(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert bench.main([*ARGUMENTS, "--max-dense-length", "97", "--csv", str(path)]) == 0
    short, long = read_rows(path)
    assert float(short["dense_ms"]) > 0
    assert long["dense_ms"] == long["dense_forward_ms"] == ""
    assert float(long["lighthouse_ms"]) > 0
    assert float(long["floor_ms"]) > 0


def test_what_does_not_fit_into_memory_stays_blank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(q: Tensor, *others: Any, **settings: Any) -> Tensor:
        if q.shape[2] == 521:
            raise torch.OutOfMemoryError
        return stock(q, *others, **settings)

    stock = bench.causal_sdpa
    monkeypatch.setattr(bench, "causal_sdpa", too_large)
    path = tmp_path / "rows.csv"
    assert bench.main([*ARGUMENTS, "--csv", str(path)]) == 0
    assert read_rows(path)[1]["dense_ms"] == ""
    assert float(read_rows(path)[1]["lighthouse_ms"]) > 0
    assert "dense at 521 tokens: out of memory" in capsys.readouterr().out


def scale_output(stage: Any) -> Any:
    return lambda *args: stage(*args) * 1.01


def scale_gradient(stage: Any) -> Any:
    def faulty(*args: Any) -> Any:
        q, k, v = stage(*args)
        k.register_hook(lambda gradient: gradient * 1.01)
        return q, k, v

    return faulty


def lose_a_row(stage: Any) -> Any:
    return lambda *args: stage(*args).index_fill(2, torch.tensor([1030]), math.nan)


@pytest.mark.parametrize(
    ("stage", "fault", "named"),
    [
        ("scatter", scale_output, "output"),
        ("scatter", lose_a_row, "output"),
        ("gather", scale_gradient, "dk"),
    ],
)
def test_a_wrong_backend_is_not_timed(
    stage: str,
    fault: Any,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faulty = SimpleNamespace(**vars(reference))
    setattr(faulty, stage, fault(getattr(reference, stage)))
    choose = attention._stages
    monkeypatch.setattr(attention, "_stages", lambda c, *on: faulty if c.backend == "auto" else choose(c, *on))
    path = tmp_path / "rows.csv"
    assert bench.main([*ARGUMENTS, "--csv", str(path)]) == 1
    assert not path.exists()
    shown = capsys.readouterr()
    assert re.fullmatch(
        rf"lighthouse bench: backend 'auto' is wrong on cpu: {named} is off by .* allowed; nothing was timed\n",
        shown.err,
    )
    assert "dense" not in shown.out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings", [{}, {"pooling_factor": 7}, {"num_levels": 5, "pooling_factor": 2}, {"top_k": 9999}]
)
def test_the_reference_agrees_with_itself(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    assert disagreement(replace(LAYER, dtype=dtype), LighthouseConfig(**settings)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is used on machines without a GPU only")
def test_the_kernels_agree_with_the_reference() -> None:
    assert disagreement(LAYER, LighthouseConfig(backend="triton")) is None


def test_a_pyramid_that_cannot_be_checked_is_refused() -> None:
    assert "too large to check" in (disagreement(LAYER, LighthouseConfig(pooling_factor=1031)) or "")


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

    measured = measure(attend, LAYER, 7, repeats=5)
    assert all(before != after for before, after in pairwise(seen[:8]))
    assert len(set(seen)) == 2
    assert len(seen) == 16
    assert len(gradients) == 8
    assert measured.peak_mib is None


def test_time_is_the_median_of_what_comes_after_the_warm_up() -> None:
    pauses = [0.03] * 3 + [0.002, 0.03, 0.002, 0.002, 0.03]
    calls = iter(pauses)
    assert 2 <= median_ms(lambda turn: time.sleep(next(calls)), CPU, repeats=5) < 25


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


def test_step_of_a_model_is_measured_with_and_without_lighthouse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    routed = patch.lighthouse_attention
    monkeypatch.setattr(patch, "lighthouse_attention", lambda *x, **kw: calls.append(x[0].shape) or routed(*x, **kw))
    path = tmp_path / "steps.csv"
    arguments = ["--device", "cpu", "--model", "toy", "--lengths", "523", "--repeats", "2", "--csv", str(path)]
    assert bench.main([*arguments, "--dense-layers", "0", "-1"]) == 0
    dense, lighthouse = read_rows(path)
    assert (dense["attention"], lighthouse["attention"]) == ("dense", "Lighthouse")
    for row in (dense, lighthouse):
        assert float(row["tokens_per_second"]) == pytest.approx(523e3 / float(row["step_ms"]), rel=1e-4)
        assert (row["model"], row["num_tokens"], row["dense_layers"]) == ("toy", "523", "0 -1")
    # two of four layers, in every step of one of the two runs
    num_steps = bench_timing.WARMUP_STEPS + 2 + 1
    assert calls == [(1, 4, 523, 32)] * 2 * num_steps
    shown = capsys.readouterr()
    assert "layers that stay dense with Lighthouse: 0 -1" in shown.out
    assert shown.err == ""


def test_first_steps_do_not_count() -> None:
    class SlowStart(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            time.sleep(1.0 if batch_idx < bench_timing.WARMUP_STEPS else 0.0)

    step_ms, peak_gib = measure_steps("toy", 13, torch.float32, CPU, 2, False, SlowStart())
    assert 0 < step_ms < 900
    assert peak_gib is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-level 3", "--num-level is not an option; did you mean --num-levels?"),
        ("--num-levels 1", "num_levels must be at least 2, got 1"),
        ("--top-k many", "argument --top-k: invalid int value: 'many'"),
        ("--heads 3 --kv-heads 2", "--heads must be a multiple of --kv-heads, got 3 and 2"),
        ("--head-dim 0", "--head-dim must be at least 1, got 0"),
        ("--lengths 64 0", "--lengths must be at least 1, got 0"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--model toy --heads 2", "--heads does not go with --model; leave it out"),
        ("--model toy --lengths 64 128", "--model takes one length, got 2"),
        ("--model toy --dtype float16", "--dtype float16 does not go with --model; use bfloat16 or float32"),
        ("--dense-layers 1", "--dense-layers does not go without --model; leave it out"),
        (
            "--pooling-factor 2048 --num-levels 4",
            "a pyramid over 512 tokens with num_levels=4 and pooling_factor=2048 has 8594130945 entries, at most "
            "2147483647 can be numbered; choose fewer levels",
        ),
        ("--csv nowhere/rows.csv", "--csv nowhere/rows.csv: there is no folder nowhere; create it"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--device", "cpu", *arguments.split()])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"lighthouse bench: {message}\n"


def test_rows_do_not_go_under_other_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("date,weather\n2026-05-01,mild\n")
    with pytest.raises(SystemExit) as stopped:
        bench.main([*ARGUMENTS, "--csv", str(path)])
    assert stopped.value.code == 2
    assert path.read_text() == "date,weather\n2026-05-01,mild\n"
    error = capsys.readouterr().err
    assert error.startswith(f"lighthouse bench: --csv {path} has other columns (")
    assert error.endswith("; name another file\n")
    assert error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layer_is_measured_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert bench.main(["--lengths", "8192", "32768", "--repeats", "5", "--csv", str(path)]) == 0
    rows = read_rows(path)
    assert [row["num_tokens"] for row in rows] == ["8192", "32768"]
    # which of the times is the shorter is a result, not a promise
    measured = ("dense_forward_ms", "dense_ms", "lighthouse_forward_ms", "lighthouse_ms", "floor_ms", "gathered_ms",
                "dense_peak_mib", "lighthouse_peak_mib")  # fmt: skip
    for row in rows:
        for name in measured:
            assert 0 < float(row[name]) < math.inf, name
