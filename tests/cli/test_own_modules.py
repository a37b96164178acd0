"""Classes of the current folder, named in a recipe; and the name under which most of them log their loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from cli_parts import RECIPE, refusal, steps
from jsonargparse import _common

from lightning_lighthouse import notices
from lightning_lighthouse.cli import commands as cli
from lightning_lighthouse.cli.trust import RULE

MODULE = """\
from cli_parts import Model

class Mine(Model):
    def validation_step(self, batch, batch_idx):
        # worse at each validation
        self.log("val_loss", float(self.global_step))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTHOUSE_DEBUG", raising=False)
    # the switch holds for the rest of a process, and so does what was said
    monkeypatch.setattr(_common, "parsing_settings", dict(_common.parsing_settings))
    monkeypatch.setattr(notices, "_given", set())
    # as behind the script `lighthouse`, which leaves the current folder out
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(Path.cwd()))])
    return tmp_path


def write(name: str, text: str = MODULE) -> None:
    """A module, and a recipe that names its class; each test has another module, for Python keeps them."""
    Path(f"{name}.py").write_text(text)
    Path("recipe.yaml").write_text(RECIPE.replace("cli_parts.Model", f"{name}.Mine"))


def test_a_class_of_the_current_folder_is_found_and_its_val_loss_taken(capsys, caplog):
    write("module_that_trains")
    flags = ["-c", "recipe.yaml", "--trainer.val_check_interval", "2"]
    with caplog.at_level("INFO"):
        assert cli.main(["fit", *flags]) == 0
    run = Path("runs/recipe/version_0")
    assert (steps(run / "checkpoints/best.ckpt"), steps(run / "checkpoints/last.ckpt")) == (2, 4)
    said = [line for line in caplog.messages if "val_loss" in line]
    assert said == ["val/loss was not logged, val_loss was: it is taken as the validation loss"]
    assert [point["loss"] for point in json.loads((run / "lighthouse.json").read_text())["validations"]] == [2.0, 4.0]
    assert "could not find the monitored key" not in capsys.readouterr().err

    # the best of before is still known
    assert cli.main(["fit", *flags, "--ckpt_path", "last", "--trainer.max_steps", "6"]) == 0
    assert (steps(run / "checkpoints/best.ckpt"), steps(run / "checkpoints/last.ckpt")) == (2, 6)
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
    assert [value["monitor"] for key, value in state.items() if key.startswith("Checkpoint")] == ["val/loss"]


DERIVED = """\
import cli_parts
import torch
from torch.utils.data import DataLoader

from lightning_lighthouse.model import Decoder

class Data(cli_parts.Data):
    def train_dataloader(self):
        return DataLoader(list(torch.ones(self.num_batches, 1, 9, dtype=torch.long)), batch_size=None)

    val_dataloader = train_dataloader

class Mine(Decoder):
    def __init__(self, learning_rate: float = 1e-3, dim: int = 12):
        sizes = dict(num_layers=2, num_heads=2, ffn_dim=32, dim=2 * dim)
        super().__init__(learning_rate=8 * learning_rate, warmup_steps=0, **sizes)
"""


def test_a_class_derived_from_the_decoder_trains_with_what_it_passes_on(capsys):
    write("module_that_derives", DERIVED)
    Path("recipe.yaml").write_text(
        Path("recipe.yaml").read_text().replace("cli_parts.Data", "module_that_derives.Data")
    )
    assert cli.main(["check", "recipe.yaml"]) == 0
    assert cli.main(["fit", "-c", "recipe.yaml"]) == 0, capsys.readouterr().err
    state = torch.load("runs/recipe/version_0/checkpoints/last.ckpt", weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 8e-3
    assert state["state_dict"]["embedding.weight"].shape == (257, 24)
    kind = sys.modules["module_that_derives"].Mine
    restored = kind.load_from_checkpoint("runs/recipe/version_0/checkpoints/last.ckpt", weights_only=True)
    assert restored.own_settings["dim"] == 24


def test_another_name_is_not_guessed(capsys):
    write("module_with_two_names", MODULE.replace("val_loss", "validation_loss"))
    assert cli.main(["fit", "-c", "recipe.yaml"]) == 1
    assert "monitor='val/loss'" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(["fit", "-c", "recipe.yaml", "--checkpoint.monitor", "validation_loss"]) == 0


def test_it_is_not_trusted(capsys):
    write("module_not_trusted", "raise AssertionError('imported')")
    Path("recipe.yaml").write_text("model: module_not_trusted.Mine\n")
    for command in ("fit", "check"):
        recipe = ["-c", "recipe.yaml"] if command == "fit" else ["recipe.yaml"]
        line = f"recipe.yaml:1: model {RULE}, got 'module_not_trusted.Mine'"
        assert refusal(capsys, command, *recipe, "--trusted_classes_only") == line
    assert "" not in sys.path


def test_a_package_is_not_hidden_by_the_current_folder(capsys):
    Path("cli_parts.py").write_text("raise AssertionError('imported')")
    Path("foreign.py").write_text("raise AssertionError('imported')")
    Path("recipe.yaml").write_text(RECIPE)
    assert cli.main(["check", "recipe.yaml"]) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1 +\n", "{file}:1: invalid syntax"),
        ("\nundefined\n", "{file}:2: NameError: name 'undefined' is not defined"),
        ("import no_such_module\n", "{file}:1: No module named 'no_such_module'"),
        ("raise RuntimeError('of its own')\n", "{file}:1: RuntimeError: of its own"),
        ("Miner = 3\n", "; did you mean Miner?"),
    ],
    ids=["syntax", "name", "import", "raise", "no class"],
)
def test_what_its_import_raises_is_one_line_with_the_place(capsys, folder, request, text, words):
    name = f"module_{request.node.callspec.id.replace(' ', '_')}"
    write(name, text)
    line = refusal(capsys, "check", "recipe.yaml")
    assert line == (
        f"recipe.yaml:2: model.class_path must be the import path of a LightningModule, got '{name}.Mine'"
        + (words if words[0] == ";" else ": " + words.format(file=folder / f"{name}.py"))
    )
