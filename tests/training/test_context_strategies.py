"""Sequences shared by several ranks train as in one process: losses, norms, weights, validations; what is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from places import HELPERS, ROOT

from lightning_lighthouse import ContextParallelDDPStrategy, ContextParallelStrategy
from lightning_lighthouse.model import Decoder
from lightning_lighthouse.training.attention_curves import AttentionCurves

SEQ_LEN = 1012


def launch(script: str, *arguments: str) -> None:
    settings = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join([str(HELPERS), str(ROOT)])}
    command = [sys.executable, str(HELPERS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """All trainings, by forks of one process that has imported everything."""
    folder = tmp_path_factory.mktemp("runs")
    draw = random.Random(1)
    texts = ("".join(draw.choices("abcdefgh ", k=700)) for _ in range(24))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    launch(
        "context_run.py",
        str(folder),
        "one:1:1:plain,local,even,accumulated,saved,recipe",
        "ddp:2:2:plain,local,even-compiled,recomputed,compiled,inductor,accumulated,saved,resumed-one",
        "fsdp:2:2:plain,local,even-compiled",
        # more ranks than key/value heads
        "ddp:4:4:plain,local,even,saved,resumed-one",
        "fsdp:4:4:plain",
        "one:1:1:resumed-ddp,resumed-four",
        "ddp:4:2:plain,recipe",
        "fsdp:4:2:plain",
        "ddp:8:8:even",
        "fsdp:8:4:even",
    )
    return folder


def result(runs: Path, name: str) -> dict[str, Any]:
    return json.loads((runs / name / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "alone"),
    [
        *((f"ddp2-{case}", case) for case in ("plain", "local", "accumulated")),
        *((f"ddp2-{case}", "plain") for case in ("recomputed", "compiled")),
        *((f"ddp2-{case}", "even") for case in ("even-compiled", "inductor")),
        *((f"fsdp2-{case}", case) for case in ("plain", "local")),
        ("fsdp2-even-compiled", "even"),
        *((f"{kind}4by2-plain", "plain") for kind in ("ddp", "fsdp")),
        *((f"ddp4-{case}", case) for case in ("plain", "local", "even")),
        ("fsdp4-plain", "plain"),
        ("ddp8-even", "even"),
        ("fsdp8by4-even", "even"),
    ],
)
def test_ranks_that_share_sequences_train_as_one_process(name, alone, runs):
    shared, whole = result(runs, name), result(runs, f"one1-{alone}")
    # float64, over both phases and the switch; metrics of validation are float32
    for key, precision in {"losses": 1e-13, "norms": 1e-12, "validations": 1e-6}.items():
        assert len(shared[key]) == len(whole[key]) > 0
        assert shared[key] == pytest.approx(whole[key], rel=precision), key
    # without a callback, by a Trainer that only validates
    assert shared["alone"] == pytest.approx(whole["alone"], rel=1e-6)
    assert shared["alone"] == shared["validations"][-1]
    # what neighbours both hold is counted once
    seq_len = 1024 if alone == "even" else SEQ_LEN
    assert shared["tokens"] == whole["tokens"] == 4 * 2 * (seq_len + 1)
    size = int(name.split("-")[0][-1])
    assert shared["shapes"] == [[1 if "by" in name else 2, seq_len // size + 1]]
    assert shared["size"] == size
    weights, wanted = (torch.load(runs / each / "final.pt", weights_only=True) for each in (name, f"one1-{alone}"))
    assert weights.keys() == wanted.keys()
    for key in weights:
        assert torch.allclose(weights[key], wanted[key], rtol=1e-9, atol=1e-11), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp2-resumed-one", "one1-resumed-ddp", "ddp4-resumed-one", "one1-resumed-four"])
def test_a_run_is_resumed_with_another_number_of_ranks(name, runs):
    rest, whole = result(runs, name), result(runs, "one1-plain")
    assert rest["losses"] == pytest.approx(whole["losses"][2:], rel=1e-13)
    assert rest["validations"][-1] == pytest.approx(whole["validations"][-1], rel=1e-6)
    assert rest["tokens"] == whole["tokens"]


@pytest.mark.slow
def test_the_recipe_shares_out_its_data_by_groups(runs):
    ranks = [json.loads((runs / "ddp4by2-recipe" / f"rank{rank}.json").read_text()) for rank in range(4)]
    steps = []
    for step in zip(*ranks, strict=True):
        shown = []
        for left, right in (step[:2], step[2:]):
            for a, b in zip(left, right, strict=True):
                assert a[-1] == b[0]
                shown.append(tuple(a + b[1:]))
        steps.append(shown)
    seen = [sequence for shown in steps for sequence in shown]
    assert len(set(seen)) == len(seen) == 8
    assert all(len(sequence) == SEQ_LEN + 1 for sequence in seen)
    # the same sequences of the epoch as one process of as large a batch, in litdata's order for as many readers
    (alone,) = (json.loads((runs / "one1-recipe" / "rank0.json").read_text()),)
    assert all(len(batch) == 2 for batch in alone)


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("said")
    launch("context_refusals.py", str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


NOT_COUNTED = "queries and keys of model.blocks.0.attn differ by"
REFUSED = {
    "ranks": "SettingError: context_parallel_size must divide the 2 ranks, got 4",
    "none": "SettingError: context_parallel_size must divide the 2 ranks, got 0",
    "positions": NOT_COUNTED,
    "validation": NOT_COUNTED,
    "convolution": NOT_COUNTED,
    "uneven": "127 tokens cannot be shared by 2 ranks; choose seq_len a multiple of 2",
    "batches": "DifferentBatchesError: the ranks that share a sequence were given different batches; share data out by",
    "probe": "FutureLeakProbe needs whole sequences and cannot run under context_parallel_size=2",
    "evaluation": "LongContextEvaluation needs whole sequences and cannot run under context_parallel_size=2",
    "documents": "documents=True cannot keep attention inside documents under context_parallel_size=2",
    # where no slice shows it
    "packed ids": "PackedBatchError: this batch packs documents (document_ids of a sequence differ)",
    "packed positions": "PackedBatchError: this batch packs documents (position_ids restart)",
    "form": "2 ranks cannot share a batch that is a list: give",
    "written out": "model.blocks.2.attn.0 ran without a call of scaled_dot_product_attention",
    "no attention": "ForeignModule cannot share sequences: no module calls SDPA",
    "dropout": "dropout_p is not 0",
    # attention in the block behind it has spread it to both
    "poisoned": "rank 0, 1 of 2: first in the output of model.blocks.1.mlp.2",
    "spoilt": "NonFiniteError: the loss is nan at step 0, lighthouse phase, rank 1 of 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_share_sequences_is_refused_in_a_line(case, said):
    for rank in said:
        assert REFUSED[case] in rank[case]
        assert "\n" not in rank[case]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "positions unchecked",
        "odd heads",
        "own form",
        "encoder",
        "encoder validated",
        "manual",
        "alone",
        "packed and ignored",
    ],
)
def test_modules_of_others_run(case, said):
    for rank in said:
        assert isinstance(rank[case], dict), rank[case]
        assert rank[case]["losses"] or rank[case]["validation"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["transformers", "decoder of transformers"])
def test_a_model_of_transformers_has_the_loss_of_the_whole_batch(case, said):
    for rank in said:
        assert rank[case]["shared"] == pytest.approx(rank[case]["whole"], rel=1e-6)


@pytest.mark.parametrize("kind", [ContextParallelStrategy, ContextParallelDDPStrategy])
@pytest.mark.parametrize(
    "options", [{"context_parallel_size": 2.0}, {"context_parallel_size": 2, "check_positions": 1}]
)
def test_values_of_other_types_are_refused(kind, options):
    with pytest.raises(TypeError, match=r"must be (int|bool), got"):
        kind(**options)


def test_flops_of_a_slice_are_those_of_the_sequence_that_attention_sees():
    module = Decoder(num_layers=2, dim=32, num_heads=4, ffn_dim=48)
    found = []
    for columns, strategy in ((129, SimpleNamespace()), (65, SimpleNamespace(tokens_before_slicing=2 * 129))):
        trainer = SimpleNamespace(strategy=strategy, datamodule=None)
        curves = AttentionCurves(trainer, module, None, None, keeps_documents=False)
        curves.begin({"tokens": torch.zeros(2, columns, dtype=torch.int64)}, False)
        found.append(curves.flops(2 * 129))
    assert found[0] == found[1]
    assert found[0][0] > 0
