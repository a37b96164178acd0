"""What version 0.1.0 wrote still works: its names, a recipe, prepared data, a checkpoint, final weights, a report.

`tests/golden/v0_1/make.py` made them; all of it is used through the command line and public names.
"""

from __future__ import annotations

import csv
import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from places import GOLDEN

from lightning_lighthouse.cli import main

WRITTEN = GOLDEN / "v0_1"
NAMES = [
    *("FutureLeakProbe", "LighthouseCallback", "LighthouseConfig", "LighthouseRecipe", "LighthouseTrainerCallback"),
    *("PlateauRule", "WeightedSource", "causal_attention", "lighthouse_attention", "patch_attention"),
    *("register_lighthouse_sdpa", "select_entries", "__version__", "model.Decoder"),
]
QUIET = ("--trainer.enable_progress_bar", "false")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy to work in; the folder moved, and its text is gone, so that nothing can be prepared again."""
    for name in ("recipe.yaml", "step-6.ckpt", "final.pt", "lighthouse.json"):
        shutil.copy(WRITTEN / name, tmp_path)
    shutil.copytree(WRITTEN / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics(path: Path, name: str) -> dict[int, float]:
    """A metric by step."""
    with path.open(newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_where_it_was(name):
    module, _, attribute = f"lightning_lighthouse.{name}".rpartition(".")
    assert getattr(import_module(module), attribute)


def test_the_recipe_is_right(folder, capsys):
    assert main(["check", "recipe.yaml"]) == 0
    assert capsys.readouterr().out == "ok\n"


def test_the_prepared_folder_is_whole(folder, capsys):
    assert main(["verify", "data"]) == 0
    assert "sha256 d2e74e9398b68ca3b7996babd9ab1a806ade9c299421b5fa1ada40854d95139e" in capsys.readouterr().out


def test_the_checkpoint_goes_on_to_the_losses_of_then(folder):
    assert main(["fit", "-c", "recipe.yaml", "--ckpt_path", "step-6.ckpt", *QUIET]) == 0
    run = Path("logs/run/version_0")
    for name in ("train/loss", "val/loss"):
        then, now = (metrics(path / "metrics.csv", name) for path in (WRITTEN, run))
        expected = {step: loss for step, loss in then.items() if step >= 6}
        assert now.keys() == expected.keys()
        # another CPU rounds differently
        assert now == pytest.approx(expected, rel=1e-5)
    report = json.loads((run / "lighthouse.json").read_text())
    assert (report["steps"], report["switch"]["switched"]) == (12, True)
    assert {name: phase["steps"] for name, phase in report["phases"].items()} == {"lighthouse": 8, "dense": 4}


def test_the_final_weights_load_and_validate_to_the_loss_of_then(folder):
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    model = import_module("lightning_lighthouse.model").Decoder(**recipe["model"]["init_args"])
    model.load_state_dict(torch.load("final.pt", weights_only=True), strict=True)
    data = import_module("lightning_lighthouse").LighthouseRecipe(**recipe["data"]["init_args"])
    data.setup("validate")
    with torch.no_grad():
        sums = [(model.token_losses(t[:, :-1], t[:, 1:]).sum(), t[:, 1:].numel()) for t in _tokens(data)]
    loss = sum(float(total) for total, _ in sums) / sum(count for _, count in sums)
    assert loss == pytest.approx(metrics(WRITTEN / "metrics.csv", "val/loss")[11], rel=1e-5)


def _tokens(data):
    for batch in data.val_dataloader():
        yield batch["tokens"] if isinstance(batch, dict) else batch


def test_the_report_is_compared(folder, capsys):
    assert main(["compare", "."]) == 0
    assert "switch_at=8 num_levels=2 pooling_factor=2 top_k=16 dense_layers=[0]" in capsys.readouterr().out
