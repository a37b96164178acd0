"""`lighthouse bench`: it refuses a wrong backend, measures what it says, and leaves blank what it did not measure."""

from __future__ import annotations

import csv
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_lighthouse.attention import lighthouse as attention
from lightning_lighthouse.attention import reference
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.bench import layer as bench_layer
from lightning_lighthouse.bench import steps as bench_steps
from lightning_lighthouse.bench.agreement import disagreement
from lightning_lighthouse.bench.layer import STAGES
from lightning_lighthouse.bench.steps import measure_steps
from lightning_lighthouse.bench.timing import Layer
from lightning_lighthouse.cli import bench
from lightning_lighthouse.cli.bench import PRESETS, complete, make_parser
from lightning_lighthouse.routing import calls as routing

CPU = torch.device("cpu")
LAYER = Layer(heads=3, kv_heads=1, head_dim=16, dtype=torch.float32, device=CPU)
# small and quick; 97 tokens are too few to compress, 521 are not
ARGUMENTS = [
    "--device",
    "cpu",
    "--heads",
    "3",
    "--kv_heads",
    "1",
    "--head_dim",
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
    assert float(long["of_floor"]) == pytest.approx(float(long["lighthouse_ms"]) / float(long["floor_ms"]), rel=1e-4)
    assert float(long["times_dense"]) == pytest.approx(float(long["dense_ms"]) / float(long["lighthouse_ms"]), rel=1e-4)
    for name in ("dense_latency_ms", "lighthouse_latency_ms", *(f"{stage}_us" for stage in STAGES)):
        assert float(long[name]) > 0, name
    # the budget is written as it came out at this length
    assert (long["top_k"], long["num_levels"]) == ("32", "3")
    # dense attention ran at 97 tokens, so there is nothing to say about Lighthouse; and a CPU's memory is not measured
    assert float(short["dense_ms"]) > 0
    blank = ("lighthouse_ms", "lighthouse_forward_ms", "floor_ms", "num_gathered", "dense_peak_mib", "score_us")
    assert [short[name] for name in blank] == [""] * len(blank)
    assert long["torch"] == torch.__version__
    assert (long["heads"], long["kv_heads"], long["head_dim"], long["dtype"]) == ("3", "1", "16", "float32")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", long["date"])

    shown = capsys.readouterr().out
    assert "on a CPU" in shown
    assert "floor: SDPA alone on the S rows that the layer gathered + 16 N-rows and 16 S-rows of 16" in shown
    assert re.search(
        r"own rows alone .* ms; score .* select .* gather .* attend .* scatter .* scatter' .* gather' ", shown
    )
    assert "forward + backward: Lighthouse" in shown


def test_dense_attention_stays_blank_above_its_length(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert bench.main([*ARGUMENTS, "--dense_up_to", "97", "--csv", str(path)]) == 0
    short, long = read_rows(path)
    assert float(short["dense_ms"]) > 0
    assert long["dense_ms"] == long["dense_forward_ms"] == ""
    assert float(long["lighthouse_ms"]) > 0
    assert float(long["floor_ms"]) > 0


def test_every_combination_is_a_row_and_scorers_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    arguments = ["--device", "cpu", "--heads", "1", "--head_dim", "8", "--repeats", "1", "--lengths", "261"]
    arguments += ["--num_levels", "3", "2", "--top_k", "16", "8", "--scorer", "norm", "dilated"]
    assert bench.main([*arguments, "--csv", str(path), "--commit", "1a2b3c4"]) == 0
    rows = read_rows(path)
    sizes = [(row["num_levels"], row["top_k"], row["scorer"]) for row in rows]
    kinds = ("norm", "dilated")
    assert sizes == [(levels, top_k, kind) for levels in ("3", "2") for top_k in ("16", "8") for kind in kinds]
    for row in rows:
        config = LighthouseConfig(int(row["num_levels"]), 4, int(row["top_k"]))
        assert row["num_gathered"] == str(config.pyramid(261).num_gathered)
        # one dense measurement serves all settings of a length
        assert row["dense_ms"] == rows[0]["dense_ms"]
        assert row["commit"] == "1a2b3c4"
    norm, dilated = rows[:2]
    share = float(dilated["lighthouse_ms"]) / float(norm["lighthouse_ms"])
    assert f"261 tokens, 3 4 16: causal/dilated takes {share:.3f} of causal" in capsys.readouterr().out


def test_rotations_are_compared_once_the_backend_has_agreed() -> None:
    asked = make_parser().parse_args(["--lengths", "512", "--device", "cpu", "--rotate", "before", "after"])
    _, settings = complete(asked)
    assert [config.rotate for _, config in settings] == ["before", "after"]
    assert disagreement(LAYER, LighthouseConfig(rotate="after")) is None


def test_options_are_spelled_like_the_keys_of_a_recipe() -> None:
    parser = make_parser()
    long = [option for option in parser._option_string_actions if option.startswith("--")]
    assert [option for option in long if "-" in option.removeprefix("--")] == []
    asked = [parser.parse_args(given).cover_prefix for given in ([], ["--cover_prefix"], ["--no_cover_prefix"])]
    assert asked == [True, True, False]
    assert [parser.parse_args(given).compile for given in ([], ["--compile"], ["--no_compile"])] == [None, True, False]


def test_the_published_preset_is_the_table_of_the_documents() -> None:
    asked = make_parser().parse_args(["--preset", "published", "--device", "cpu", "--selection", "published", "causal"])
    _, settings = complete(asked)
    published = [(n, c.num_levels, c.pooling_factor, c.top_k) for n, c in settings if c.selection == "published"]
    assert published == PRESETS["published"]
    assert [c.selection for _, c in settings] == ["published", "causal"] * 9
    gathered = [config.pyramid(n).num_gathered for n, config in settings[::2]]
    assert gathered == [10_240, 12_288, 18_432, 16_384, 24_576, 32_768, 40_960, 65_536, 65_536]


@pytest.mark.parametrize(
    ("given", "dense_layers"),
    [([], None), (["--dense_layers"], []), (["--dense_layers", "0", "-1"], [0, -1]),
     (["--dense_layers", "published"], "published")],
)  # fmt: skip
def test_dense_layers_of_a_model(given: list[str], dense_layers: Any) -> None:
    asked = make_parser().parse_args(["--model", "toy", "--device", "cpu", *given])
    complete(asked)
    assert asked.dense_layers == dense_layers


def test_what_does_not_fit_into_memory_stays_blank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(q: Tensor, *others: Any, **settings: Any) -> Tensor:
        if q.shape[2] == 521:
            raise torch.OutOfMemoryError
        return stock(q, *others, **settings)

    stock = bench_layer.causal_sdpa
    monkeypatch.setattr(bench_layer, "causal_sdpa", too_large)
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
    choose = attention.choose_stages
    monkeypatch.setattr(attention, "choose_stages", lambda c, *on: faulty if c.backend == "auto" else choose(c, *on))
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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is used on machines without a GPU only")
def test_the_kernels_agree_with_the_reference() -> None:
    assert disagreement(LAYER, LighthouseConfig(backend="triton", selection="published")) is None


def test_a_step_without_compression_stays_blank(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cpu", "--model", "toy", "--lengths", "20", "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Lighthouse: 20 tokens are too short to gain and get dense attention, left blank" in shown
    assert re.search(r"Lighthouse +causal( +-){4}$", shown, re.MULTILINE)


def test_step_of_a_model_is_measured_with_and_without_lighthouse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    routed = routing.lighthouse_attention
    monkeypatch.setattr(routing, "lighthouse_attention", lambda *x, **kw: calls.append(x[0].shape) or routed(*x, **kw))
    path = tmp_path / "steps.csv"
    arguments = ["--device", "cpu", "--model", "toy", "--lengths", "523", "--repeats", "2", "--csv", str(path)]
    assert bench.main([*arguments, "--dense_layers", "0", "-1", "--selection", "published", "strided"]) == 0
    rows = read_rows(path)
    assert [row["attention"] for row in rows] == ["dense", "Lighthouse", "Lighthouse"]
    assert [row["selection"] for row in rows[1:]] == ["published", "strided"]
    for row in rows:
        assert float(row["tokens_per_second"]) == pytest.approx(523e3 / float(row["step_ms"]), rel=1e-4)
        assert (row["model"], row["num_tokens"], row["dense_layers"]) == ("toy", "523", "0 -1")
    # two of four layers, in every step of two of the three runs
    num_steps = bench_steps.WARMUP_STEPS + 2 + 1
    assert calls == [(1, 4, 523, 32)] * 2 * 2 * num_steps
    shown = capsys.readouterr()
    assert "layers that stay dense with Lighthouse: 0 -1" in shown.out
    assert shown.err == ""


def test_first_steps_do_not_count() -> None:
    class SlowStart(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            time.sleep(0.5 if batch_idx < bench_steps.WARMUP_STEPS else 0.0)

    step_ms, peak_gib = measure_steps("toy", 13, torch.float32, CPU, 2, False, SlowStart())
    assert 0 < step_ms < 450
    assert peak_gib is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num_level 3", "--num_level is not an option; did you mean --num_levels?"),
        # spelled as everywhere else: with underscores
        ("--top-k 3", "--top-k is not an option; did you mean --top_k?"),
        ("--preset published --lengths 64", "--lengths does not go with --preset; leave it out"),
        ("--model toy --preset published", "--preset does not go with --model; leave it out"),
        ("--num_levels 1", "num_levels must be at least 2, got 1"),
        ("--top_k many", "argument --top_k: invalid int value: 'many'"),
        ("--heads 3 --kv_heads 2", "--heads must be a multiple of --kv_heads, got 3 and 2"),
        ("--head_dim 0", "--head_dim must be at least 1, got 0"),
        ("--head_dim 3 --rotate after", "--head_dim must be even with --rotate after, got 3"),
        ("--lengths 64 0", "--lengths must be at least 1, got 0"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--model toy --heads 2", "--heads does not go with --model; leave it out"),
        ("--model toy --lengths 64 128", "--model takes one length, got 2"),
        ("--model toy --dtype float16", "--dtype float16 does not go with --model; use bfloat16 or float32"),
        ("--dense_layers 1", "--dense_layers does not go without --model; leave it out"),
        (
            "--pooling_factor 2048 --num_levels 4",
            "a pyramid over 512 tokens with num_levels=4 and pooling_factor=2048 has 8594130945 entries, at most "
            "2147483647 can be numbered; choose fewer levels",
        ),
        # all padding: it would take minutes, or all memory
        (
            "--num_levels 12 --lengths 64",
            "num_levels=12 and pooling_factor=4 are too large to compare backends on 1031 tokens, without which "
            "nothing is timed",
        ),
        (
            "--pooling_factor 1031",
            "num_levels=3 and pooling_factor=1031 are too large to compare backends on 1031 tokens, without which "
            "nothing is timed",
        ),
        ("--model toy --dense_layers last", "argument --dense_layers: must be integers or published, got 'last'"),
        ("--model toy --dense_layers 99", "dense_layers must be from -4 to 3 for 4 layers, got 99"),
        (
            "--model toy --dense_layers 0 1 2 3",
            "all 4 attention layers stay dense (dense_layers=[0, 1, 2, 3]), nothing is left to route; leave "
            "dense_layers out to route every layer",
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
    measured = ("dense_forward_ms", "dense_ms", "dense_latency_ms", "lighthouse_forward_ms", "lighthouse_ms",
                "lighthouse_latency_ms", "floor_ms", "gathered_ms", "dense_peak_mib", "lighthouse_peak_mib",
                *(f"{stage}_us" for stage in STAGES))  # fmt: skip
    for row in rows:
        for name in measured:
            assert 0 < float(row[name]) < math.inf, name
