"""The command line: help, layers of recipes, and what a run would use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_parts import RECIPE, config

from lightning_lighthouse.cli import commands as cli
from lightning_lighthouse.cli.first_help import OPTIONS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTHOUSE_DEBUG", raising=False)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_check_says_ok_and_makes_nothing(capsys, folder):
    assert cli.main(["check", "recipe.yaml", "--model.width", "5"]) == 0
    assert capsys.readouterr() == ("ok\n", "")
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in cli.COMMANDS:
        assert sum(line.split()[:1] == [command] for line in lines) == 1


@pytest.mark.parametrize("command", ["fit", "validate", "test", "recipes", "check", "prepare", "verify"])
def test_each_command_has_help(capsys, command):
    assert cli.main([command, "--help"]) == 0
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.startswith("usage: lighthouse")
    assert f" {command} " in usage


def test_the_first_screen_is_what_people_set(capsys):
    assert cli.main(["fit", "-c", "recipe.yaml", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  -") for line in lines) == 20
    assert max(map(len, lines)) <= 120
    assert "Every option: lighthouse fit --help.all." in lines[-2]


def test_all_options_are_shown_on_demand(capsys):
    assert cli.main(["fit", "--help.all"]) == 0
    page = capsys.readouterr().out
    settings = config(capsys)
    for group in ("trainer", "lighthouse", "checkpoint"):
        assert len(settings[group]) > 8
        assert all(f"  --{group}.{name}" in page for name in settings[group])


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_the_first_screen_knows_the_defaults(capsys, command):
    """They are written down a second time, so that help appears at once."""
    assert cli.main([command, "--print_config"]) == 0
    defaults = yaml.safe_load(capsys.readouterr().out)
    assert cli.main([command, "--help"]) == 0
    page = capsys.readouterr().out
    asked = [option for option in OPTIONS if command in option.commands]
    assert len(asked) > 8
    for option in asked:
        group, *rest = option.key.split(".")
        value = defaults[group]
        for part in ["init_args", *rest] if group in ("model", "data") else rest:
            value = value[part]
        assert (value, type(value)) == (option.default, type(option.default)), option.key
        assert f"\n  --{option.key} " in page


def test_a_model_has_help(capsys):
    assert cli.main(["fit", "--model.help", "cli_parts.Model"]) == 0
    assert "--model.width" in capsys.readouterr().out


def test_later_recipes_win_and_flags_win_over_all(capsys):
    Path("more.yaml").write_text(
        "trainer: {max_steps: 5}\nmodel: {init_args: {width: 7}}\nlighthouse: {switch_at: 0.5}\n"
    )
    flags = ["--lighthouse.switch_at", "0.25", "--lighthouse.attention.top_k=12"]
    layered = config(capsys, *flags, "-c", "recipe.yaml", "--config=more.yaml")
    assert layered["trainer"]["max_steps"] == 5
    assert layered["trainer"]["accelerator"] == "cpu"
    assert layered["model"] == {
        "class_path": "cli_parts.Model",
        "init_args": {"width": 7, "num_heads": 1, "fault": None, "at_step": 2},
    }
    assert layered["lighthouse"]["switch_at"] == 0.25
    assert layered["lighthouse"]["attention"]["top_k"] == 12
    # the runs of a layered recipe have their own folder
    assert layered["trainer"]["logger"]["init_args"]["name"] == "recipe-more"


def test_switch_at_keeps_its_type(capsys):
    for text, value in (("1", 1), ("1.0", 1.0), ("300", 300), ("0.9", 0.9)):
        found = config(capsys, "-c", "recipe.yaml", "--lighthouse.switch_at", text)["lighthouse"]["switch_at"]
        assert (found, type(found)) == (value, type(value))


def test_dense_layers_are_positions_or_the_papers(capsys):
    for text, value in (("published", "published"), ("[0, -1]", [0, -1]), ("[]", []), ("null", None)):
        found = config(capsys, "-c", "recipe.yaml", "--lighthouse.dense_layers", text)["lighthouse"]["dense_layers"]
        assert found == value


def test_the_printed_config_is_a_recipe(capsys):
    assert cli.main(["fit", "-c", "recipe.yaml", "--print_config"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["check", "printed.yaml"]) == 0
    first, second = (config(capsys, "-c", name) for name in ("recipe.yaml", "printed.yaml"))
    # the name of the runs is given in one and follows from the file in the other
    assert first == second


def test_a_logger_of_another_class_needs_only_its_name(capsys):
    logger = config(capsys, "-c", "recipe.yaml", "--trainer.logger", "CSVLogger")["trainer"]["logger"]
    assert logger["class_path"].endswith("CSVLogger")
    assert config(capsys, "-c", "recipe.yaml", "--trainer.logger", "false")["trainer"]["logger"] is False


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom lightning_lighthouse.cli.commands import main\n"
        "assert main(['--help']) == main(['fit', '-h']) == 0\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'litdata'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
