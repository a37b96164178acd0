"""The command line: the settings that ease the switch, in a recipe and as flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_parts import RECIPE, config

from lightning_lighthouse.cli import commands as cli

SWITCH = """
lighthouse:
  enabled: false
  switch_at: 0.8
  return_steps: 4
  rewarm_steps: 10
  plateau:
    patience: 2
    min_gain_per_second: 1e-4
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTHOUSE_DEBUG", raising=False)
    Path("recipe.yaml").write_text(RECIPE)
    Path("switch.yaml").write_text(SWITCH)
    return tmp_path


BOTH = ("-c", "recipe.yaml", "-c", "switch.yaml")


def test_the_settings_of_the_switch_are_read(capsys):
    given = config(capsys, *BOTH)["lighthouse"]
    assert given["plateau"] == {"patience": 2, "min_gain_per_second": 1e-4, "earliest": 0}
    assert (given["return_steps"], given["rewarm_steps"]) == (4, 10)
    flags = ("--lighthouse.plateau.patience", "5", "--lighthouse.plateau.earliest", "0.5")
    changed = config(capsys, *BOTH, *flags)["lighthouse"]["plateau"]
    assert changed == {"patience": 5, "min_gain_per_second": 1e-4, "earliest": 0.5}
    assert config(capsys, *BOTH, "--lighthouse.plateau", "null")["lighthouse"]["plateau"] is None
    alone = config(capsys, "-c", "recipe.yaml", "--lighthouse.plateau.patience", "5")["lighthouse"]["plateau"]
    assert alone["patience"] == 5


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        (("plateau.patience", "0"), "lighthouse.plateau.patience must be at least 1, got 0"),
        (("plateau.patience", "soon"), "lighthouse.plateau.patience must be int, got 'soon'"),
        (("plateau.patiense", "3"), "lighthouse.plateau.patiense is not a known key; did you mean patience?"),
        (("return_steps", "-1"), "lighthouse.return_steps must be at least 0, got -1"),
        (("rewarm_steps", "1.5"), "lighthouse.rewarm_steps must be int, got '1.5'"),
    ],
)
@pytest.mark.parametrize("command", [("check", "recipe.yaml"), ("fit", "-c", "recipe.yaml")])
def test_wrong_ones_are_a_line(capsys, folder, command, flag, line):
    before = sorted(folder.rglob("*"))
    name, value = flag
    assert cli.main([*command, f"--lighthouse.{name}", value]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"lighthouse: {line}")
    assert sorted(folder.rglob("*")) == before


def test_a_run_writes_its_report():
    assert cli.main(["fit", *BOTH]) == 0
    report = json.loads(Path("runs/recipe-switch/version_0/lighthouse.json").read_text())
    assert report["settings"]["plateau"]["patience"] == 2
    assert report["phases"]["dense"]["steps"] == report["steps"] == 4
    assert report["validations"]
