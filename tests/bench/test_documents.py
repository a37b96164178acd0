"""`lighthouse bench layer --documents`: every way over the same drawn batches, and none that goes across documents."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lighthouse import Documents, LighthouseConfig
from lightning_lighthouse.attention import kernels, reference
from lightning_lighthouse.attention.documents_sdpa import documents_sdpa
from lightning_lighthouse.attention.sdpa import causal_sdpa
from lightning_lighthouse.bench import documents as bench_documents
from lightning_lighthouse.bench.document_estimate import estimate
from lightning_lighthouse.bench.document_kinds import DESCRIPTIONS, KINDS, draw_sequences
from lightning_lighthouse.bench.documents import (
    BATCHES,
    FlexDocuments,
    all_of,
    document_disagreement,
    document_passes,
    small_documents,
    tables_ms,
)
from lightning_lighthouse.bench.layer import input_sets
from lightning_lighthouse.bench.timing import Layer
from lightning_lighthouse.cli import bench

CPU = torch.device("cpu")
LAYER = Layer(heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, device=CPU)
ARGUMENTS = ["layer", "--device", "cpu", "--heads", "2", "--kv_heads", "1", "--head_dim", "16", "--repeats", "1"]


@pytest.fixture
def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_documents, "BATCHES", 2)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("num_tokens", [1, 97, 4099])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_are_drawn_again_and_have_all_their_tokens(kind: str, num_tokens: int) -> None:
    sequences = draw_sequences(kind, num_tokens, 7, seed=3)
    assert sequences == draw_sequences(kind, num_tokens, 7, seed=3)
    assert len(sequences) == 7
    assert all(sum(lengths) == num_tokens and min(lengths) > 0 for lengths in sequences)
    assert kind in DESCRIPTIONS


def test_a_document_goes_on_in_the_next_sequence() -> None:
    # every document is longer than 999 tokens, and most are cut
    pieces = [n for lengths in draw_sequences("code", 700, 50) for n in lengths]
    assert sum(n < 700 for n in pieces) <= 2 * len(pieces) / 3
    assert set(draw_sequences("one", 700, 5)) == {(700,)}
    assert all(lengths[0] >= 350 for lengths in draw_sequences("whole", 701, 20))


@pytest.mark.filterwarnings("ignore::lightning_lighthouse.LighthouseWarning")
def test_documents_are_measured_printed_and_written(
    few_batches: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    asked = ["--lengths", "521", "--csv", str(path), "--commit", "abc"]
    assert bench.main([*ARGUMENTS, *asked, "--documents", "one", "chat", "--max_documents", "3"]) == 0
    rows = read_rows(path)
    assert [(row["kind"], row["num_tokens"], row["commit"]) for row in rows] == [
        (kind, "521", "abc") for kind in ("one", "chat")
    ]
    for row in rows:
        sequences = list(dict.fromkeys(draw_sequences(row["kind"], 521, 2)))
        expected = estimate(sequences, LighthouseConfig(max_documents=3))
        assert int(row["batches"]) == len(sequences)
        found = [float(row[name]) for name in ("documents", "length", "masked_estimate_ms", "lighthouse_estimate_ms")]
        wanted = [expected.documents, expected.length, expected.dense_ms, expected.lighthouse_ms]
        assert found == pytest.approx(wanted, rel=1e-4)
        assert min(float(row[name]) for name in ("dense_ms", "masked_ms", "masked_forward_ms")) > 0
        # nothing of others runs on a CPU, which the estimate is not for
        blank = ("flex_ms", "varlen_ms", "masked_peak_mib", "masked_device_ms", "tables_ms", "masked_of_estimate")
        assert {row[name] for name in blank} == {""}
    one, chat = rows
    gain = float(one["masked_ms"]) / float(one["lighthouse_ms"])
    assert float(one["times_masked"]) == pytest.approx(gain, rel=1e-4)
    # more than memory is kept for: dense, and nothing of Lighthouse to time
    assert (chat["dense_batches"], chat["lighthouse_ms"], chat["times_masked"]) == (chat["batches"], "", "")
    shown = capsys.readouterr().out
    assert "Lighthouse runs dense inside the documents of 2 of 2 batches" in shown
    assert re.search(r"^ +one +521 +1 +521 ", shown, re.MULTILINE)


def test_every_way_meets_all_batches_each_with_documents_of_its_own() -> None:
    seen: list[Documents] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        seen.append(documents)
        return documents_sdpa(q, k, v, documents)

    sequences = draw_sequences("web", 97, 3)
    for run in document_passes(attend, input_sets(LAYER, 97), sequences):
        all_of(run, 3)(0)
        all_of(run, 3)(1)
    assert [documents.lengths for documents in seen] == [(lengths,) for lengths in sequences] * 4
    assert len({documents.host.data_ptr() for documents in seen}) == len(seen)


def test_a_batch_is_new_whenever_it_comes_again() -> None:
    from lightning_lighthouse.attention import documents_lighthouse, host_tables

    kept = documents_lighthouse._is_crowded.cache_info().maxsize, host_tables._KEPT
    assert all(size is not None and size < BATCHES for size in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"selection": "published", "max_documents": 1}, {"rotate": "after"}])
def test_the_ways_agree_with_a_loop_over_documents(settings: dict[str, Any], dtype: torch.dtype) -> None:
    layer = Layer(LAYER.heads, LAYER.kv_heads, LAYER.head_dim, dtype, CPU)
    assert document_disagreement(layer, LighthouseConfig(**settings)) is None


def test_the_small_case_is_not_dense() -> None:
    for num_tokens in (1031, 4099):
        assert small_documents(num_tokens, LighthouseConfig(top_k=num_tokens // 16)).num_documents == 6
    one = small_documents(1031, LighthouseConfig(top_k=64, max_documents=1))
    assert one.lengths == ((1031,),)


@pytest.mark.parametrize(
    ("name", "message"),
    [("documents_sdpa", "documents_sdpa"), ("lighthouse_attention", "Lighthouse inside documents")],
)
def test_a_way_that_goes_across_documents_is_not_timed(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(bench_documents, name)

    def across(q: Tensor, k: Tensor, v: Tensor, *settings: Any, **more: Any) -> Tensor:
        if name == "documents_sdpa":
            return causal_sdpa(q, k, v, scale=None, backend="auto")
        # the loop that it is compared with stays inside
        is_loop = settings[0].backend == "reference"
        return right(q, k, v, *settings, **(more if is_loop else more | {"documents": None}))

    monkeypatch.setattr(bench_documents, name, across)
    assert bench.main([*ARGUMENTS, "--lengths", "521", "--documents", "web"]) == 1
    shown = capsys.readouterr()
    wrong = rf"lighthouse bench: {message} is wrong on cpu: output is off by .* allowed; nothing was timed\n"
    assert re.fullmatch(wrong, shown.err)
    assert "masked" not in shown.out


@pytest.mark.filterwarnings("ignore::lightning_lighthouse.LighthouseWarning")
def test_others_that_are_wrong_or_cannot_run_are_left_out_and_said_why(
    few_batches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def across(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        return causal_sdpa(q, k, v, scale=None, backend="auto")

    def inside(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        if documents.num_tokens == 97:
            raise RuntimeError("no such kernel\nand more")
        return documents_sdpa(q, k, v, documents)

    path = tmp_path / "rows.csv"
    # too many documents for Lighthouse, which needs no time then
    asked = [*ARGUMENTS, "--lengths", "97", "521", "--documents", "chat", "--max_documents", "1", "--csv", str(path)]
    monkeypatch.setattr(bench_documents, "varlen_documents", lambda layer: across)
    assert bench.main(asked) == 0
    monkeypatch.setattr(bench_documents, "varlen_documents", lambda layer: inside)
    assert bench.main(asked) == 0
    assert [row["varlen_ms"] == "" for row in read_rows(path)] == [True, True, True, False]
    shown = capsys.readouterr().out
    assert re.search(r"^varlen inside documents: output is off by .* is allowed, left blank$", shown, re.MULTILINE)
    assert "varlen at 97 tokens: no such kernel, left blank\n" in shown


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_host_makes_tables_for_kernels_alone(device_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = []
    monkeypatch.setattr(bench_documents, "choose_stages", lambda *_: reference if device_type == "cpu" else kernels)
    right = bench_documents.place_tables
    monkeypatch.setattr(bench_documents, "place_tables", lambda *each: placed.append(right(*each)))
    sequences = draw_sequences("web", 521, 3)
    ms = tables_ms(LAYER, sequences, LighthouseConfig())
    assert (ms is None or ms > 0, len(placed)) == (True, 0 if device_type == "cpu" else 6)
    assert (ms is None) == (device_type == "cpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_sees_what_documents_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flex = FlexDocuments(LAYER, 200)
    q, k, v, _ = (x.detach() for x in input_sets(LAYER, 200)[0])
    for lengths in ((200,), (3, 130, 67), (1,) * 200):
        documents = Documents([lengths])
        torch.testing.assert_close(flex(q, k, v, documents), documents_sdpa(q, k, v, documents))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--documents tales", "argument --documents: invalid choice: 'tales' (choose from "),
        ("--documents web --type window", "--documents does not go with --type window; leave it out"),
        ("--documents web --model toy", "--documents does not go with --model; leave it out"),
        ("--documents web --scorer norm dilated", "--scorer dilated does not go with --documents; leave it out"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main([*arguments.split(), "--device", "cpu"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.replace("'", "")
    assert error.startswith(f"lighthouse bench: {message}".replace("'", ""))
    assert error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_are_measured_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    asked = ["--documents", "one", "web", "--lengths", "16384", "--repeats", "5", "--csv", str(path)]
    assert bench.main(["layer", *asked]) == 0
    for row in read_rows(path):
        for who in ("dense", "masked", "lighthouse", "flex", "varlen"):
            for what in ("forward_ms", "ms", "peak_mib"):
                assert 0 < float(row[f"{who}_{what}"]) < math.inf, (row["kind"], who, what)
        for name in ("masked_device_ms", "lighthouse_device_ms", "tables_ms", "flex_mask_ms", "lighthouse_of_estimate"):
            assert 0 < float(row[name]) < math.inf, (row["kind"], name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_is_compiled_once_for_all_batches() -> None:
    from torch._dynamo.utils import counters

    layer = Layer(2, 2, 64, torch.bfloat16, torch.device("cuda"))
    flex = FlexDocuments(layer, 2000)
    sequences = draw_sequences("web", 2000, 6)
    _, both = document_passes(flex, input_sets(layer, 2000), sequences)
    both(0)
    graphs = counters["stats"]["unique_graphs"]
    all_of(both, 6)(0)
    assert counters["stats"]["unique_graphs"] == graphs
