"""Operators under names that no compiled graph of other sources knows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lighthouse.attention.operators import NAMESPACE, PACKAGE, edition

# what a training compiles, with its backward
PROGRAM = """
import torch
from lightning_lighthouse import LighthouseConfig, lighthouse_attention
config = LighthouseConfig(3, 2, 4, backend="triton")
layer = torch.compile(lambda *qkv: lighthouse_attention(*qkv, config), fullgraph=True)
layer(*(torch.ones(1, 1, 83, 8, requires_grad=True) for _ in range(3))).sum().backward()
print(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
"""


def copied(folder: Path) -> Path:
    package = folder / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


@pytest.mark.parametrize("changed", ["attention/kernels/rows.py", "context/edges.py"])
def test_other_sources_of_operators_have_other_names(changed, tmp_path):
    package = copied(tmp_path)
    assert f"lightning_lighthouse_{edition(package)}" == NAMESPACE
    (package / "cli" / "fit.py").write_text("")
    assert edition(package) == edition()
    (package / changed).write_text((package / changed).read_text() + "#")
    assert edition(package) != edition()


@pytest.mark.slow
def test_graphs_that_another_version_left_on_disk_are_not_called(tmp_path):
    def hits(folder: Path) -> str:
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "1"}
        environment = os.environ | caches | {"PYTHONPATH": str(folder)}
        program = [sys.executable, "-c", PROGRAM]
        ended = subprocess.run(program, env=environment, cwd=folder, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    copied(tmp_path / "old")
    module = copied(tmp_path / "new") / "attention" / "fused_lighthouse.py"
    # an operator that the old graph calls
    module.write_text(module.read_text().replace("_lighthouse_backward", "_lighthouse_gradients"))
    assert [hits(tmp_path / "old"), hits(tmp_path / "old"), hits(tmp_path / "new")] == ["0", "1", "0"]
