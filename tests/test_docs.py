"""The pages name only what there is: files of this repository, and commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_lighthouse.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "log.md")]
FILE = re.compile(r"(?<![\w./])(?:recipes|examples|experiments|tests|docs)/[\w./-]+\.\w+")
COMMAND = re.compile(r"^ {4}(?:\.venv/bin/)?lighthouse ([\w-]+)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES])
def test_a_page_names_only_what_there_is(page):
    text = page.read_text()
    # "tests/a.py::test" and ranges of names are no file's
    gone = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    assert not gone
    unknown = {name for name in COMMAND.findall(text) if not name.startswith("--")} - set(COMMANDS)
    assert not unknown
