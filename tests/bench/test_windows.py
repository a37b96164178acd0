"""`lighthouse bench layer --type window` and `chunk`: measured beside dense and others, refused where wrong."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from lightning_lighthouse.attention.reference import window_mask
from lightning_lighthouse.bench import windows as bench_windows
from lightning_lighthouse.bench.rivals import block_mask, flex, varlen_attention
from lightning_lighthouse.bench.timing import Layer
from lightning_lighthouse.bench.windows import WindowSetting, window_disagreement
from lightning_lighthouse.cli import bench

CPU = torch.device("cpu")
LAYER = Layer(heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, device=CPU)
ARGUMENTS = ["--device", "cpu", "--heads", "2", "--kv_heads", "1", "--head_dim", "16", "--repeats", "1"]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_windows_are_measured_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    asked = [*ARGUMENTS, "--type", "window", "--lengths", "521", "67", "--csv", str(path)]
    assert bench.main(["layer", *asked, "--window", "32", "64", "--sink_tokens", "0", "4"]) == 0
    rows = read_rows(path)
    settings = [(row["type"], row["num_tokens"], row["window"], row["sink_tokens"]) for row in rows]
    assert settings == [("window", n, w, s) for n in ("67", "521") for w in ("32", "64") for s in ("0", "4")]
    # 64 and 4 of 67 tokens are dense attention: there is nothing to say
    is_dense = [(row["num_tokens"], row["window"], row["sink_tokens"]) == ("67", "64", "4") for row in rows]
    assert [row["layer_ms"] == row["layer_forward_ms"] == row["times_dense"] == "" for row in rows] == is_dense
    for row in rows:
        # forward + backward is more than forward; half of it allows for a busy CPU
        assert float(row["dense_ms"]) > float(row["dense_forward_ms"]) / 2 > 0
        # nothing of others runs on a CPU, whose memory is not measured
        others = ("varlen_ms", "varlen_forward_ms", "flex_ms", "flex_forward_ms", "of_varlen", "of_flex")
        assert {row[name] for name in (*others, "dense_peak_mib", "layer_peak_mib")} == {""}
    gain = float(rows[-1]["dense_ms"]) / float(rows[-1]["layer_ms"])
    assert float(rows[-1]["times_dense"]) == pytest.approx(gain, rel=1e-4)
    shown = capsys.readouterr().out
    assert "its block mask is made outside of the times" in shown
    assert re.search(r"^ +521 +64 +4 +[\d.]+ +[\d.]+ +- +- ", shown, re.MULTILINE)


def test_chunks_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    asked = [*ARGUMENTS, "--type", "chunk", "--lengths", "521", "--dense_up_to", "64", "--csv", str(path)]
    assert bench.main(asked) == 0
    (row,) = read_rows(path)
    assert (row["type"], row["window"], row["sink_tokens"], row["dense_ms"]) == ("chunk", "64", "0", "")
    assert float(row["layer_ms"]) > float(row["layer_forward_ms"]) / 2 > 0


def test_the_word_layer_changes_nothing() -> None:
    asked = ["--device", "cpu", "--lengths", "64"]
    with_word, without = (vars(bench.make_parser().parse_args(given)) for given in (["layer", *asked], asked))
    assert (with_word.pop("what"), without.pop("what")) == ("layer", None)
    assert with_word == without


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--window 64", "--window does not go with --type lighthouse; leave it out"),
        ("--sink_tokens 4", "--sink_tokens does not go with --type lighthouse; leave it out"),
        ("--type chunk --sink_tokens 4", "--sink_tokens does not go with --type chunk; leave it out"),
        ("--type window --selection causal", "--selection does not go with --type window; leave it out"),
        ("--type window --no_cover_prefix", "--cover_prefix does not go with --type window; leave it out"),
        ("--type window --model toy", "--model does not go with --type window; leave it out"),
        ("--type window --preset published", "--preset does not go with --type window; leave it out"),
        ("layer --model toy", "layer does not go with --model; leave it out"),
        ("step", "argument layer: invalid choice: 'step' (choose from 'layer')"),
        ("--type window --window 64 0", "--window must be at least 1, got 0"),
        ("--type window --sink_tokens -1", "--sink_tokens must be at least 0, got -1"),
        ("--type windows", "argument --type: invalid choice: 'windows' (choose from 'lighthouse', 'window', 'chunk')"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main([*arguments.split(), "--device", "cpu"])
    assert stopped.value.code == 2
    # Python's versions quote choices differently
    assert capsys.readouterr().err.replace("'", "") == f"lighthouse bench: {message}\n".replace("'", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "window", "sinks"), [("window", 1, 4), ("window", 63, 0), ("chunk", 9999, 0)])
def test_the_layers_agree_with_their_reference(kind: str, window: int, sinks: int, dtype: torch.dtype) -> None:
    layer = Layer(LAYER.heads, LAYER.kv_heads, LAYER.head_dim, dtype, CPU)
    assert window_disagreement(layer, WindowSetting(kind, window, sinks, "auto")) is None


@pytest.mark.parametrize("kind", ["window", "chunk"])
@pytest.mark.parametrize("window", [7, 64])
def test_the_rounding_of_stock_attention_is_no_disagreement(kind: str, window: int) -> None:
    # the command's own layer, on whose sums the reference is up to three times as exact
    layer = Layer(8, 8, 128, torch.float32, CPU)
    assert window_disagreement(layer, WindowSetting(kind, window, 0, "auto")) is None


@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_a_wrong_layer_is_not_timed(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(bench_windows, f"{kind}_attention")
    # a window that is one token too long
    monkeypatch.setattr(
        bench_windows, f"{kind}_attention", lambda q, k, v, window, **kw: right(q, k, v, window + 1, **kw)
    )
    assert bench.main([*ARGUMENTS, "--type", kind, "--lengths", "521", "--window", "64"]) == 1
    shown = capsys.readouterr()
    wrong = rf"lighthouse bench: {kind} 64 is wrong on cpu: output is off by .* allowed; nothing was timed\n"
    assert re.fullmatch(wrong, shown.err)
    assert "dense" not in shown.out


@pytest.mark.parametrize("num_tokens", [128, 1000, 1024])
@pytest.mark.parametrize(
    ("kind", "window", "sinks"),
    [("window", 1, 0), ("window", 200, 4), ("window", 512, 300), ("chunk", 4, 0), ("chunk", 200, 0), ("chunk", 256, 0)],
)
def test_the_block_mask_is_that_of_torch(kind: str, window: int, sinks: int, num_tokens: int) -> None:
    mine = block_mask(num_tokens, kind, window, sinks, CPU)
    torchs = create_block_mask(mine.mask_mod, None, None, num_tokens, num_tokens, device="cpu")
    assert torch.equal(mine.to_dense(), torchs.to_dense())
    # torch calls no block full that the end cuts off
    if num_tokens % 128 == 0:
        assert torch.equal(mine.full_kv_num_blocks, torchs.full_kv_num_blocks)


def test_the_mask_of_flex_is_that_of_the_layer() -> None:
    at = torch.arange(200)
    sees = block_mask(200, "window", 37, 5, CPU).mask_mod(at, at, at[:, None], at)
    assert torch.equal(sees, window_mask(200, 37, 5))


def test_others_are_left_out_on_a_cpu() -> None:
    assert varlen_attention(LAYER, 521, "window", 64) is None
    assert flex(LAYER, 521, "window", 64, 0) is None


def test_who_cannot_run_is_left_out_and_said_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*qkv: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(bench_windows, "flex", lambda *setting: crash)
    path = tmp_path / "rows.csv"
    assert bench.main([*ARGUMENTS, "--type", "window", "--lengths", "521", "--csv", str(path)]) == 0
    (row,) = read_rows(path)
    assert (row["flex_ms"], float(row["layer_ms"]) > 0) == ("", True)
    assert "flex at 521 tokens: no such kernel, left blank\n" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_all_are_measured_on_a_gpu(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    asked = ["--type", kind, "--lengths", "8192", "--window", "512", "--repeats", "5", "--csv", str(path)]
    assert bench.main(asked) == 0
    (row,) = read_rows(path)
    for who in ("dense", "layer", "varlen", "flex"):
        for what in ("forward_ms", "ms", "peak_mib"):
            assert 0 < float(row[f"{who}_{what}"]) < math.inf, (who, what)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "window", "sinks"), [("window", 200, 0), ("window", 512, 300), ("chunk", 200, 0)])
def test_others_compute_the_same(kind: str, window: int, sinks: int) -> None:
    layer = Layer(2, 2, 64, torch.bfloat16, torch.device("cuda"))
    q, k, v = (torch.randn(1, 1000, 2, 64, device="cuda").bfloat16().transpose(1, 2) for _ in range(3))
    expected = WindowSetting(kind, window, sinks, "auto").attend(q, k, v)
    rivals = [flex(layer, 1000, kind, window, sinks)]
    rivals += [varlen_attention(layer, 1000, kind, window)] if sinks == 0 else []
    for rival in rivals:
        assert rival is not None
        torch.testing.assert_close(rival(q, k, v), expected, rtol=2e-2, atol=2e-2)
