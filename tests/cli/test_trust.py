"""Recipes from others: with --trusted_classes_only, nothing is imported but this package and Lightning."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_parts import RECIPE, config, refusal
from places import RECIPES
from shipped import save_base

from lightning_lighthouse.cli import commands as cli
from lightning_lighthouse.cli import recipe_check as cli_check
from lightning_lighthouse.cli import trust as cli_trust

FOREIGN = """\
import pathlib
from lightning.pytorch import Callback, LightningModule

pathlib.Path("imported").write_text("by a recipe")


class Guest(Callback):
    pass


class Model(LightningModule):
    pass


def run(*_):
    pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("foreign_guest.py").write_text(FOREIGN)
    yield tmp_path
    sys.modules.pop("foreign_guest", None)


RULE = "must be a class of lightning_lighthouse or lightning with --trusted_classes_only, got"
UNTRUSTED = {
    "model": (
        "model:\n  class_path: foreign_guest.Model\n",
        f"shared.yaml:2: model.class_path {RULE} 'foreign_guest.Model'",
    ),
    "model, its path alone": ("model: foreign_guest.Model\n", f"shared.yaml:1: model {RULE} 'foreign_guest.Model'"),
    "callback": (
        "trainer:\n  callbacks:\n  - class_path: foreign_guest.Guest\n",
        f"shared.yaml:3: trainer.callbacks[0].class_path {RULE} 'foreign_guest.Guest'",
    ),
    "callback, its path alone": (
        "trainer:\n  callbacks: [foreign_guest.Guest]\n",
        f"shared.yaml:2: trainer.callbacks {RULE} 'foreign_guest.Guest'",
    ),
    "deep inside": (
        "model:\n  class_path: lightning_lighthouse.model.Decoder\n  init_args:\n"
        "    preset: [{a: {class_path: foreign_guest.Model}}]\n",
        f"shared.yaml:4: model.init_args.preset[0].a.class_path {RULE} 'foreign_guest.Model'",
    ),
    "in dict_kwargs": (
        "trainer:\n  callbacks:\n  - class_path: ModelSummary\n"
        "    dict_kwargs: {a: {class_path: foreign_guest.Guest}}\n",
        f"shared.yaml:4: trainer.callbacks[0].dict_kwargs.a.class_path {RULE} 'foreign_guest.Guest'",
    ),
    "no path": (
        "model:\n  class_path: [foreign_guest.Model]\n",
        f"shared.yaml:2: model.class_path {RULE} ['foreign_guest.Model']",
    ),
    "a function": (
        "trainer:\n  callbacks:\n  - class_path: LambdaCallback\n"
        "    init_args:\n      on_fit_start: foreign_guest.run\n",
        f"shared.yaml:5: trainer.callbacks[0].init_args.on_fit_start {RULE} 'foreign_guest.run'",
    ),
    "a function through a module of Lightning": (
        "trainer:\n  callbacks:\n  - class_path: LambdaCallback\n    init_args:\n"
        "      on_fit_start: lightning.pytorch.cli.os.system\n",
        f"shared.yaml:5: trainer.callbacks[0].init_args.on_fit_start {RULE} 'lightning.pytorch.cli.os.system'",
    ),
    "another file": ("trainer: other.yaml\n", "shared.yaml:1: trainer must be a group of keys, got 'other.yaml'"),
    "a name that begins alike": (
        "model: lightning_lighthouse_2.Model\n",
        f"shared.yaml:1: model {RULE} 'lightning_lighthouse_2.Model'",
    ),
}


@pytest.mark.parametrize("command", ["fit", "check"])
@pytest.mark.parametrize(("text", "line"), UNTRUSTED.values(), ids=UNTRUSTED)
def test_what_is_not_trusted_is_named_and_not_imported(capsys, text, line, command):
    Path("shared.yaml").write_text(text)
    Path("other.yaml").write_text("callbacks:\n- class_path: foreign_guest.Guest\n")
    recipes = ["-c", "shared.yaml"] if command == "fit" else ["shared.yaml"]
    assert refusal(capsys, command, "--trusted_classes_only", *recipes) == line
    assert "foreign_guest" not in sys.modules
    assert not Path("imported").exists()


def test_flags_are_held_to_it_too(capsys):
    Path("empty.yaml").write_text("{}\n")
    for flags in (["--model", "foreign_guest.Model"], ["--model.class_path", "foreign_guest.Model"]):
        assert RULE in refusal(capsys, "fit", "-c", "empty.yaml", *flags, "--trusted_classes_only")
    assert not Path("imported").exists()
    line = "--trusted_classes_only takes no value, got 'false'"
    assert refusal(capsys, "fit", "--trusted_classes_only=false") == line


def test_without_the_switch_a_recipe_is_code(capsys):
    Path("shared.yaml").write_text("model:\n  class_path: foreign_guest.Model\n")
    assert config(capsys, "-c", "shared.yaml")["model"]["class_path"] == "foreign_guest.Model"
    assert Path("imported").read_text() == "by a recipe"


def test_jsonargparse_refuses_what_slips_through(capsys, monkeypatch):
    """As if our own comparison had a hole."""
    monkeypatch.setattr(cli_check, "untrusted_classes", lambda _: iter(()))
    monkeypatch.setattr(cli_check, "is_trusted", lambda _: True)
    monkeypatch.setattr(cli_check, "names_code", lambda _: False)
    Path("shared.yaml").write_text(UNTRUSTED["a function"][0])
    assert "on_fit_start" in refusal(capsys, "fit", "--trusted_classes_only", "-c", "shared.yaml")
    assert "foreign_guest" not in sys.modules


def test_an_old_jsonargparse_is_told_of(capsys, monkeypatch):
    def old(*, config_read_mode_urls_enabled=None):
        pass

    monkeypatch.setattr(cli_trust, "set_parsing_settings", old)
    line = "--trusted_classes_only needs a newer jsonargparse: pip install -U jsonargparse"
    Path("shared.yaml").write_text("{}\n")
    assert refusal(capsys, "fit", "-c", "shared.yaml", "--trusted_classes_only") == line


def test_what_is_ours_and_lightnings_is_taken(capsys):
    Path("shared.yaml").write_text(
        "trainer:\n  accelerator: cpu\n  max_steps: 30\n"
        "  callbacks: [RichModelSummary, {class_path: lightning.pytorch.callbacks.LearningRateMonitor}]\n"
        "data:\n  class_path: lightning_lighthouse.LighthouseRecipe\n"
    )
    assert cli.main(["check", "--trusted_classes_only", "shared.yaml"]) == 0
    assert capsys.readouterr() == ("ok\n", "")


def test_a_model_of_ones_own_is_not_trusted(capsys):
    Path("recipe.yaml").write_text(RECIPE)
    line = refusal(capsys, "fit", "-c", "recipe.yaml", "--trusted_classes_only")
    assert line == f"recipe.yaml:2: model.class_path {RULE} 'cli_parts.Model'"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_can_be_trusted(capsys, path):
    flags = ["--data.source", "text.jsonl", "--trainer.accelerator", "cpu"]
    save_base(path)
    assert cli.main(["check", str(path), *flags, "--trusted_classes_only"]) == 0
