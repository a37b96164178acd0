"""Imports go one way, and cost only what is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from places import DOCS, PACKAGE

# Lower floors never import higher ones; files of one floor may import each other where no circle arises.
FLOORS = [
    [
        "arguments",
        "checks",
        "pyramid",
        "config",
        "hashing",
        "leak",
        "ledger",
        "notices",
        "plateau",
        "rewarm",
        "run_state",
        "schedule",
        "stopwatch",
        "text",
        "watch",
        "whole_file",
    ],
    ["sdpa", "dilated"],
    ["winners"],
    ["reference", "kernels"],
    ["backends", "attention"],
    ["adapters", "targets", "audit", "patch", "reasons", "routing", "spread"],
    ["parallel", "curves", "report", "switching", "decoder", "export", "guard", "resume", "saving", "data", "model"],
    ["callback", "comparison", "compare", "huggingface"],
    ["bench", "probe"],
    ["cli"],
]


def floor(module: str) -> int:
    head = module.split(".")[0]
    # cli_check and the like belong to cli
    return next(n for n, names in enumerate(FLOORS) if head in names or head.split("_")[0] in names)


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, functions' imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_lighthouse"):
            inner = (node.module or "").removeprefix("lightning_lighthouse").removeprefix(".")
            found |= {inner} if inner else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".", 1)[1] for a in node.names if a.name.startswith("lightning_lighthouse.")}
    return {name for name in found if (PACKAGE / name.split(".")[0]).exists() or (PACKAGE / f"{name}.py").exists()}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE) != Path("__init__.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    here = str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".")
    for name in imports(path):
        # the command line hands its settings to Lightning by class, before any of them runs
        assert floor(name) <= floor(here), f"{here} imports {name}"
        assert {here.split(".")[0], name.split(".")[0]} != {"reference", "kernels"}, (
            "the twins know nothing of each other"
        )


def test_the_design_names_every_file():
    page = (DOCS / "understand" / "design.md").read_text()
    names = {path.name if path.is_file() else f"{path.name}/" for path in PACKAGE.iterdir() if path.name[0] not in "_."}
    names = {"cli*.py" if name.startswith("cli") else name for name in names} - {"py.typed"}
    assert {name for name in names if f"`{name}`" not in page} == set()


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
