"""docs/use/reliability.md names a test for each row, and each test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from places import DOCS, TESTS

PAGE = (DOCS / "use" / "reliability.md").read_text()


def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_row_names_a_test_that_exists():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.endswith("| Test |")]
    assert len(rows) > 40
    known: dict[str, set[str]] = {}
    for path in TESTS.rglob("test_*.py"):
        # two rooms may have files of one name
        known.setdefault(path.name, set()).update(names_in(path))
    everywhere = set().union(*known.values())
    for row in rows:
        named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", row.rsplit("|", 2)[1])
        assert named, f"no test in: {row}"
        for file, name in named:
            assert name in (known[file] if file else everywhere), name
