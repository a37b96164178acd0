"""The pages name only what there is: files of this repository, commands, and settings that a recipe takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from places import RECIPES, ROOT
from shipped import save_base

from lightning_lighthouse.cli import commands as cli

PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "log.md")]
FILE = re.compile(r"(?<![\w./])(?:recipes|examples|experiments|tests|docs)/[\w./-]+\.\w+")
COMMAND = re.compile(r"^#? {4,5}(?:\.venv/bin/)?lighthouse ([\w-]+)(.*)$", re.MULTILINE)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of `lighthouse` in a page's blocks, and what follows each."""
    text = re.sub(r"\\\n#? *", " ", page.read_text())
    return [(name, shlex.split(rest, comments=True)) for name, rest in COMMAND.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES])
def test_a_page_names_only_what_there_is(page):
    assert [name for name in FILE.findall(page.read_text()) if not (ROOT / name).exists()] == []
    assert {name for name, _ in commands(page) if not name.startswith("-")} <= set(cli.COMMANDS)


# trainings with a recipe that ships: what such a command says is right, wherever it would run
TRAININGS = sorted(
    {
        tuple(arguments)
        for page in [*PAGES, *RECIPES.glob("*.yaml")]
        for name, arguments in commands(page)
        if name == "fit" and any(argument.startswith("recipes/") for argument in arguments)
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", TRAININGS, ids=" ".join)
def test_the_settings_of_a_command_are_right(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    files = [str(ROOT / argument) if argument.startswith("recipes/") else argument for argument in arguments]
    for argument in arguments:
        if argument.startswith("recipes/"):
            save_base(ROOT / argument)
    status = cli.main(["check", *files])
    captured = capsys.readouterr()
    assert (status, captured.out.splitlines()[-1:]) == (0, ["ok"]), captured.err
