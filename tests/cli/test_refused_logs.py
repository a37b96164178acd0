"""A run that is refused leaves no log folder; one that trained keeps it, however it ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_parts import RECIPE

from lightning_lighthouse.cli import commands as cli


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.name != "recipe.yaml")


def test_a_refused_run_leaves_no_folder():
    assert cli.main(["fit", "-c", "recipe.yaml", "--data", "cli_parts.Unready"]) == 1
    assert files() == []


def test_what_was_there_before_stays():
    kept = Path("runs/recipe/version_0/notes.txt")
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    # the next version, and then the folder itself
    for version in ([], ["--trainer.logger.init_args.version", "0"]):
        assert cli.main(["fit", "-c", "recipe.yaml", "--data", "cli_parts.Unready", *version]) == 1
        assert Path("runs/recipe/version_1").exists() is False
        assert kept.read_text() == "mine"


def test_a_run_that_trained_keeps_its_folder():
    assert cli.main(["fit", "-c", "recipe.yaml", "--model.fault", "broken"]) == 1
    assert "runs/recipe/version_0/config.yaml" in files()
