"""The programs of the tutorials: each runs, and does what its page says."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from places import RECIPES

from lightning_lighthouse.cli import commands as cli

EXAMPLES = RECIPES.parent / "examples"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield tmp_path
    sys.modules.pop("own_module", None)


def program(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_a_loop_of_ones_own_goes_through_both_phases(capsys):
    program("plain_loop")["main"](steps=5)
    assert "step 5: dense, loss " in capsys.readouterr().out


@pytest.mark.slow
def test_a_module_of_ones_own_goes_through_both_phases_and_its_weights_are_its_own():
    example = program("own_module")
    example["main"](steps=40)
    run = Path("lightning_logs/version_0")
    report = json.loads((run / "lighthouse.json").read_text())
    assert {name: phase["steps"] for name, phase in report["phases"].items()} == {
        "window 64 \u00d73 + lighthouse": 30,
        "dense": 10,
    }
    assert [step["step"] for step in json.loads((run / "evaluation.json").read_text())["steps"]] == [30, 40]
    model = example["Model"]()
    model.load_state_dict(torch.load(run / "final.pt", weights_only=True))


@pytest.mark.slow
def test_a_tokenizer_is_trained_and_a_model_over_it(capsys):
    pytest.importorskip("tokenizers")
    Path("data").mkdir()
    Path("text").mkdir()
    for number, page in enumerate(sorted((RECIPES.parent / "docs").rglob("*.md"))):
        Path(f"text/{number}.md").write_text(page.read_text())
    train = program("train_tokenizer")["main"]
    train(["data/tokenizer.json", "text"])
    assert "data/tokenizer.json: 4,096 tokens" in capsys.readouterr().out
    few = ["--trainer.max_steps", "10", "--trainer.val_check_interval", "5", "--trainer.limit_val_batches", "1"]
    assert cli.main(["fit", "-c", str(RECIPES / "own-tokenizer.yaml"), "--data.source", "text", *few]) == 0
    report = json.loads(Path("runs/own-tokenizer/version_0/lighthouse.json").read_text())
    assert report["phases"]["window 128 \u00d73 + lighthouse"]["steps"] == 9
    # another vocabulary than the model's is refused before anything trains
    train(["data/other.json", "text", "--vocab_size", "5000"])
    other = ["--data.tokenizer", "data/other.json", "--data.output_dir", "data/other"]
    assert cli.main(["fit", "-c", str(RECIPES / "own-tokenizer.yaml"), "--data.source", "text", *other]) != 0
    assert "vocab_size" in capsys.readouterr().err


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(folder):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "two_phases.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "dense: 15 steps" in printed
    assert "tokens  512 to 1024: " in printed
    # kept without what a run prints
    assert not any(cell.get("outputs") for cell in nbformat.read(EXAMPLES / "two_phases.ipynb", as_version=4).cells)
