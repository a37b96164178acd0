"""What version 0.1.0 left on a user's disk is read, checked and trained to the end as it was then.

`golden/v0_1` was written by that version; its `make.py` says how.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_lighthouse
from lightning_lighthouse import LighthouseRecipe, cli
from lightning_lighthouse.model import Decoder

GOLDEN = Path(__file__).parent / "golden" / "v0_1"
RUN = Path("runs/recipe/version_0")
# Recipes, checkpoints and programs of users name these places
PLACES = {
    "lightning_lighthouse": [
        "FutureLeakProbe",
        "LighthouseCallback",
        "LighthouseConfig",
        "LighthouseRecipe",
        "LighthouseTrainerCallback",
        "PlateauRule",
        "WeightedSource",
        "causal_attention",
        "lighthouse_attention",
        "patch_attention",
        "register_lighthouse_sdpa",
        "select_entries",
    ],
    "lightning_lighthouse.model": ["Decoder"],
    "lightning_lighthouse.cli": ["main"],
}
# Another CPU rounds differently, which moves these losses by 2e-7; another selection of entries moves them by 4e-4
CLOSE = 1e-5


def recorded(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text())


def sizes() -> dict:
    """The arguments of the model."""
    return yaml.safe_load((GOLDEN / "recipe.yaml").read_text())["model"]["init_args"]


def bits(values: dict[str, str]) -> dict[int, float]:
    return {int(step): float.fromhex(value) for step, value in values.items()}


def content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def training_losses(run: Path) -> dict[int, float]:
    """By step, from the curves of both phases."""
    found = {}
    for phase in ("lighthouse", "dense"):
        curves = EventAccumulator(str(run / phase)).Reload()
        found |= {event.step: event.value for event in curves.Scalars("train/loss")}
    return found


def moved(folder: Path) -> Path:
    """The run where it was stopped, in another place; the text that it was prepared from is gone."""
    shutil.copytree(GOLDEN / "prepared", folder / "prepared")
    shutil.copy(GOLDEN / "recipe.yaml", folder)
    (folder / RUN / "checkpoints").mkdir(parents=True)
    shutil.copy(GOLDEN / "stopped.ckpt", folder / RUN / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The folder of the run after its end, and the warnings on the way."""
    folder = moved(tmp_path_factory.mktemp("resumed"))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        patch.chdir(folder)
        warnings.simplefilter("always")
        assert cli.main(["fit", "-c", "recipe.yaml", "--ckpt_path", "last"]) == 0
    return folder, [str(warning.message) for warning in caught]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return moved(tmp_path)


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in PLACES.items() for name in names])
def test_a_name_is_where_it_was(place, name):
    assert getattr(import_module(place), name).__name__ == name


def test_no_name_has_gone():
    assert set(PLACES["lightning_lighthouse"]) <= set(lightning_lighthouse.__all__)


@pytest.mark.parametrize("file", ["recipe.yaml", "config.yaml"])
def test_a_recipe_is_right(folder, capsys, file):
    assert cli.main(["check", "--trusted_classes_only", str(GOLDEN / file)]) == 0
    out, err = capsys.readouterr()
    # before it, what there is to know of the prepared documents
    assert (out.splitlines()[-1], err) == ("ok", "")


def test_prepared_data_verifies(folder):
    command = [sys.executable, "-m", "lightning_lighthouse.cli", "verify", "prepared"]
    environment = os.environ | {"PYTHONPATH": str(Path(lightning_lighthouse.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_checkpoint_is_data_and_names_its_model():
    model = Decoder.load_from_checkpoint(GOLDEN / "stopped.ckpt", weights_only=True)
    assert type(model) is Decoder
    assert model.hparams.items() >= sizes().items()


def test_a_stopped_run_goes_on_to_the_same_losses(resumed):
    folder, _ = resumed
    losses = recorded("losses.json")
    assert training_losses(folder / RUN) == pytest.approx(bits(losses["train"]), rel=CLOSE)
    report = json.loads((folder / RUN / "lighthouse.json").read_text())
    validations = {validation["step"]: validation["loss"] for validation in report["validations"]}
    assert validations == pytest.approx(bits(losses["validation"]), rel=CLOSE)
    weights, expected = (torch.load(path / "final.pt", weights_only=True) for path in (folder / RUN, GOLDEN))
    assert list(weights) == list(expected)


def test_it_finds_all_of_its_state(resumed):
    _, caught = resumed
    # Lightning looks for the state of a callback by the name of its class
    assert not [line for line in caught if "callbacks used to create the checkpoint" in line or "dirpath" in line]


def test_its_data_is_not_prepared_anew(resumed):
    folder, _ = resumed
    assert content(folder / "prepared") == content(GOLDEN / "prepared")


def test_its_report_has_every_key(resumed):
    folder, _ = resumed
    old, new = recorded("lighthouse.json"), json.loads((folder / RUN / "lighthouse.json").read_text())
    assert new["version"] == old["version"]
    assert new.keys() >= old.keys()
    attention = [report["settings"].pop("attention") for report in (new, old)]
    assert attention[0].items() >= attention[1].items()
    assert new["settings"].items() >= old["settings"].items()
    assert new["switch"].items() >= old["switch"].items()
    # validations of before the stop are the checkpoint's
    assert [v for v in new["validations"] if v["step"] < 9] == [v for v in old["validations"] if v["step"] < 9]
    for phase, totals in old["phases"].items():
        assert new["phases"][phase].keys() >= totals.keys()
        assert (new["phases"][phase]["steps"], new["phases"][phase]["tokens"]) == (totals["steps"], totals["tokens"])


def test_final_weights_are_the_same_model(folder):
    model = Decoder(**sizes())
    model.load_state_dict(torch.load(GOLDEN / "final.pt", weights_only=True), strict=True)
    data = LighthouseRecipe(512, batch_size=2, source="prepared", num_workers=0)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    [metrics] = trainer.validate(model, data, verbose=False)
    loss = recorded("lighthouse.json")["validations"][-1]["loss"]
    assert metrics["val/loss"] == pytest.approx(loss, rel=CLOSE)
    assert metrics["val/bits_per_byte"] > 0


def test_a_report_is_compared(capsys):
    assert cli.main(["compare", str(GOLDEN)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = recorded("lighthouse.json")
    steps = " + ".join(str(report["phases"][phase]["steps"]) for phase in ("lighthouse", "dense"))
    for cell in (steps, "switch_at=0.7", f"{report['validations'][-1]['loss']:.4f}"):
        assert cell in out
