"""FutureLeakProbe in whole runs: a model that cheats, several ranks, torch.compile, the command line."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from all_lighthouse import all_lighthouse
from places import HELPERS
from probing import Module, fit, lighthouse
from torch.utils.data import DataLoader

from lightning_lighthouse import FutureLeakProbe, LighthouseConfig
from lightning_lighthouse.cli import commands as cli
from lightning_lighthouse.model import Decoder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_find_the_same_and_train_as_without_a_probe(strategy, tmp_path):
    script = HELPERS / "probe_run.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, str(script), strategy, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    found = ranks[0]["probe"]
    assert [result["step"] for result in found] == [2, 4]
    assert ranks[1]["probe"] == found
    assert all(rank["probed"] == rank["alone"] for rank in ranks)
    # a trial has 2 positions on each rank
    assert all(result["num_positions"] % 4 == 0 and result["num_positions"] > 0 for result in found)
    if strategy == "fsdp2":
        # the text of both ranks: 4 sequences each, validated at steps 2, 4 and 6
        losses = [loss for rank in ranks for loss in rank["probed"][1][4:8]]
        assert found[1]["dense_loss"] == pytest.approx(sum(losses) / 8, rel=1e-6)
        # 3 positions in each part of a sequence are inside a window
        assert found[1]["num_positions"] <= 2 * 4 * 2 * 3
    rows = csv.DictReader((tmp_path / "probe.csv").read_text().splitlines())
    assert [float(row["leak_nats"]) for row in rows] == [result["leak_nats"] for result in found]


@pytest.mark.slow
def test_a_compiled_model_compiles_one_frame_more(tmp_path):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    counts = {}
    for probes in ([], [FutureLeakProbe(every_n_steps=2)]):
        torch.compiler.reset()
        compiled.clear()
        module = Module()
        for block in module.model.blocks:
            block.compile(backend=backend, fullgraph=True, dynamic=False)
        fit(tmp_path, [lighthouse(), *probes], module)
        counts[len(probes)] = len(compiled)
    assert counts[1] == counts[0] + 1


RECIPE = {
    "lighthouse": {
        "switch_at": 4,
        "layer_types": ["lighthouse"],
        "attention": {"num_levels": 2, "pooling_factor": 2, "top_k": 8},
    },
    "model": {"init_args": {"num_layers": 3, "dim": 16, "num_heads": 2, "ffn_dim": 24, "vocab_size": 31}},
    "data": {"class_path": "probing.Tokens"},
    "trainer": {"accelerator": "cpu", "max_steps": 6, "val_check_interval": 2, "enable_progress_bar": False},
}


def test_the_command_line_builds_and_runs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    flags = ["-c", "recipe.yaml", "--trainer.callbacks+=lightning_lighthouse.FutureLeakProbe"]
    flags += ["--trainer.callbacks.init_args.max_seconds", "1"]
    assert cli.main(["fit", *flags]) == 0
    rows = list(csv.DictReader(Path("runs/recipe/version_0/probe.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2", "4"]
    assert float(rows[-1]["lighthouse_loss"]) > 0
    capsys.readouterr()
    assert cli.main(["check", *flags, "--trainer.callbacks.init_args.num_batches", "0"]) == 2
    assert "num_batches must be at least 1, got 0" in capsys.readouterr().err


class CheatData(DataLoader):
    """Every second token is drawn at random; the one before it is always 0 and says nothing of it."""

    def __init__(self, count: int, seed: int) -> None:
        tokens = torch.randint(1, 5, (count, 129), generator=torch.Generator().manual_seed(seed))
        tokens[:, ::2] = 0
        super().__init__(tokens, batch_size=8)


def train_a_cheat(folder: Path, selection: str, num_steps: int = 60) -> dict[bool, FutureLeakProbe]:
    """Train to predict what cannot be known; a probe of each kind."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "dim": 32, "num_heads": 2, "ffn_dim": 64, "vocab_size": 5}
    module = Decoder(**sizes, learning_rate=5e-3, warmup_steps=10)
    # the norms stay what they are: each token has one, and so each of two windows
    module.embedding.requires_grad_(False)
    for block in module.blocks:
        block.attention.qkv.requires_grad_(False)
    config = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=25, selection=selection)

    class AnotherProbe(FutureLeakProbe):
        state_key = "another"

    limits = {"every_n_steps": 0, "max_stderr": 0.05, "max_seconds": 20.0, "max_total_seconds": 40}
    probes = {True: FutureLeakProbe(**limits), False: AnotherProbe(**limits, many_positions=False)}
    callbacks = [all_lighthouse(num_steps, config, dense_layers=[]), *probes.values()]
    train, validation = CheatData(8 * num_steps, seed=0), CheatData(32, seed=1)
    fit(folder, callbacks, module, num_steps + 1, train, validation, val_check_interval=num_steps // 2)
    return probes


@pytest.mark.slow
def test_a_model_that_learns_to_cheat_is_seen_through(tmp_path):
    found = {many: probe.results[-1] for many, probe in train_a_cheat(tmp_path, "published").items()}
    for result in found.values():
        assert result.leak_nats > 0.3
        assert result.leak_nats > 5 * result.leak_stderr
    # better than anyone could without the future: half of the tokens are one of four, drawn alike
    known = torch.log(torch.tensor(4.0)).item() / 2
    assert found[True].lighthouse_loss < 0.9 * known < known < found[True].dense_loss + 0.02
    assert found[True].spike_nats > 0.1
    # many positions at a time measure the same thing
    difference = found[True].leak_nats - found[False].leak_nats
    assert abs(difference) < 4 * (found[True].leak_stderr ** 2 + found[False].leak_stderr ** 2) ** 0.5


@pytest.mark.slow
def test_with_a_causal_selection_there_is_nothing_to_learn(tmp_path):
    probes = train_a_cheat(tmp_path, "causal")
    exact, quick = probes[False].results[-1], probes[True].results[-1]
    assert (exact.leak_nats, exact.leak_stderr) == (0.0, 0.0)
    assert abs(quick.leak_nats) <= 4 * quick.leak_stderr + 1e-6
    known = torch.log(torch.tensor(4.0)).item() / 2
    assert exact.lighthouse_loss > known - 0.02
