"""The recipes that ship, where the package is installed as well as in a checkout; and no command without one."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cli_parts import refusal
from places import RECIPES, ROOT

from lightning_lighthouse.cli import commands as cli

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
LISTED = ", ".join(NAMES)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "subject"),
    [
        (["fit"], "train"),
        (["fit", "--trainer.max_steps", "3"], "train"),
        (["validate"], "evaluate"),
        (["test", "--ckpt_path", "last.ckpt"], "evaluate"),
        (["check", "--trainer.max_steps", "3"], "look at"),
    ],
    ids=" ".join,
)
def test_a_recipe_is_asked_for(capsys, argv, subject):
    assert refusal(capsys, *argv) == (
        f"{argv[0]} needs a recipe that says what to {subject}: -c RECIPE.yaml; those that ship are {LISTED}, and "
        "lighthouse recipes NAME > my.yaml writes one"
    )


def test_each_recipe_is_listed_with_a_sentence(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    for line, name in zip(lines, NAMES, strict=True):
        sentence = line.removeprefix(name).strip()
        assert sentence.endswith(".")
        assert (RECIPES / f"{name}.yaml").read_text().startswith(f"# {sentence}\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_written_out_as_it_is(capsys, name):
    for spelled in (name, f"{name}.yaml"):
        assert cli.main(["recipes", spelled]) == 0
        assert capsys.readouterr().out == (RECIPES / f"{name}.yaml").read_text()


def test_a_recipe_that_does_not_ship_is_one_line(capsys):
    assert cli.main(["recipes", "quikstart"]) == 2
    line = f"lighthouse recipes: 'quikstart' is no recipe; allowed: {LISTED}; did you mean quickstart?\n"
    assert capsys.readouterr() == ("", line)


def test_a_wheel_has_them_too(folder, capsys):
    pytest.importorskip("hatchling", reason="wheels are built by hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = Path("dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall("installed")
    code = "import lightning_lighthouse as l, sys; print(l.__file__); from lightning_lighthouse.cli import main; "
    environment = {**os.environ, "PYTHONPATH": str(folder / "installed")}

    def installed(*argv: str) -> tuple[int, str, str]:
        command = [sys.executable, "-c", f"{code}sys.exit(main())", *argv]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        file, _, out = run.stdout.partition("\n")
        assert Path(file).is_relative_to(folder / "installed")
        return run.returncode, out, run.stderr

    cli.main(["recipes"])
    assert installed("recipes") == (0, *capsys.readouterr())
    assert installed("recipes", "quickstart") == (0, (RECIPES / "quickstart.yaml").read_text(), "")
    status, out, err = installed("fit")
    assert (status, out) == (2, "")
    assert f"those that ship are {LISTED}, " in err
