"""Imports go one way, and cost only what is used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
from places import DOCS, PACKAGE, ROOT

# Lower floors never import higher ones.
FLOORS = [
    {"checks", "notices", "bars"},
    {"attention"},
    {"context"},
    {"routing", "phases"},
    {"evaluation", "runs", "data", "model"},
    {"training", "huggingface", "bench"},
    {"cli"},
]
# What a room may import of its own floor.
SIBLINGS = {("notices", "checks"), ("evaluation", "runs"), ("bench", "training")}
# What these rooms never import, not even late; the adapters may ask transformers, late.
HEAVY = {"lightning", "pytorch_lightning", "litdata", "transformers"}
FILES = sorted(PACKAGE.rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix("__init__").rstrip(".")


MODULES = {named(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, by its whole name: in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            ours = module.removeprefix("lightning_lighthouse").lstrip(".")
            inner = {alias.name: f"{ours}.{alias.name}".lstrip(".") for alias in node.names}
            is_ours = module.split(".")[0] == "lightning_lighthouse"
            found |= {f"{module}.{name}" if is_ours and whole in MODULES else module for name, whole in inner.items()}
    return found


def ours(path: Path) -> set[str]:
    """The modules of this package among them, by their name within it; "" is the package itself."""
    return {
        name.removeprefix("lightning_lighthouse").lstrip(".")
        for name in imports(path)
        if name.split(".")[0] == "lightning_lighthouse"
    }


def room(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_one_way(module):
    for name in ours(MODULES[module]) - {""}:
        assert name in MODULES, f"{module} imports {name}, which does not exist"
        allowed = floor(name) < floor(module) or room(name) == room(module) or (room(module), room(name)) in SIBLINGS
        assert allowed, f"{module} imports {name}"
        twins = {"attention.reference", "attention.kernels"}
        pair = {next((twin for twin in twins if one.startswith(twin)), one) for one in (module, name)}
        assert pair != twins, "the twins know nothing of each other"
    assert "" not in ours(MODULES[module]) or module == "cli.commands", f"{module} imports the API page"


def test_no_circle_between_files():
    graph = {module: ours(path) - {module} for module, path in MODULES.items() if module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' > '.join(error.args[1])}") from None


PLAIN = ("attention", "context", "routing", "phases")


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in PLAIN])
def test_attention_routing_and_phases_import_no_framework(module):
    found = {name.split(".")[0] for name in imports(MODULES[module])} & HEAVY
    assert found <= ({"transformers"} if module.startswith("routing.adapters.") else set())


def test_only_four_files_stand_at_the_root():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "checks.py", "notices.py", "bars.py"}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == set().union(*FLOORS[1:])


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_a_room_says_in_a_sentence_what_it_is_for(module):
    text = ast.get_docstring(ast.parse(MODULES[module].read_text())) or ""
    assert text.split("\n\n")[0].endswith(".")


def test_the_design_names_every_file():
    page = (DOCS / "understand" / "design.md").read_text()
    files = [path.name for path in FILES if path.name not in ("__init__.py", "__main__.py")]
    assert {name for name in files if f"`{name}`" not in page} == set()


def printed(code: str) -> str:
    """What a fresh process prints that runs `code`."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def loaded(statement: str) -> set[str]:
    """Top-level packages in `sys.modules` of a fresh process after a statement."""
    return set(printed(f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})").split())


def test_attention_and_patch_need_neither_lightning_nor_litdata_nor_triton():
    names = loaded("from lightning_lighthouse import patch_attention, lighthouse_attention, LighthouseConfig")
    assert "torch" in names
    assert not names & {"lightning", "litdata", "tensorboard", "jsonargparse", "transformers"}


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from lightning_lighthouse import LighthouseConfig, lighthouse_attention
q = torch.randn(1, 1, 521, 5)
for backend in ("reference", "auto", "triton"):
    try:
        out = lighthouse_attention(q, q, q, LighthouseConfig(backend=backend))
        print(backend, list(out.shape), bool(out.isfinite().all()))
    except ImportError as error:
        print(backend, error)
"""


def test_without_triton_the_reference_runs_and_the_kernels_say_what_is_missing():
    assert printed(WITHOUT_TRITON).splitlines() == [
        "reference [1, 1, 521, 5] True",
        "auto [1, 1, 521, 5] True",
        "triton backend='triton' needs the package triton, which is not installed; install it or choose "
        "backend='reference'",
    ]


def test_the_package_itself_imports_nothing_heavy():
    assert not loaded("import lightning_lighthouse") & {"torch", "lightning", "litdata", "triton"}


def test_an_unknown_name_is_an_attribute_error():
    import lightning_lighthouse

    with pytest.raises(AttributeError, match="no attribute 'LighthouseCalback'"):
        lightning_lighthouse.LighthouseCalback  # noqa: B018


def test_the_public_names_are_all_there():
    import lightning_lighthouse

    assert all(getattr(lightning_lighthouse, name).__name__ == name for name in lightning_lighthouse.__all__)


# where a package is imported under another name than it is installed by
INSTALLED_AS = {"yaml": "pyyaml"}


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    declared = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("-", "_") for line in wanted}
    found = {name.split(".")[0] for path in FILES for name in imports(path)} - set(sys.stdlib_module_names)
    foreign = {INSTALLED_AS.get(name, name) for name in found} - {"lightning_lighthouse"}
    # comes with torch for CUDA, and is asked for by name where it is missing
    assert foreign - {"triton"} <= declared


def test_the_version_is_that_of_the_installed_package():
    import lightning_lighthouse

    assert lightning_lighthouse.__version__ == version("lightning_lighthouse")
