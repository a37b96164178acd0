"""What messages quote: cut where it is long, in every one of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from places import PACKAGE

from lightning_lighthouse import LighthouseCallback, LighthouseConfig, LighthouseRecipe, patch_attention
from lightning_lighthouse.checks import quoted, shown
from lightning_lighthouse.model import Decoder

HUGE = "x" * 1_000_000


# an attribute that a module lacks is named as Python does
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_no_message_quotes_a_value_whole(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FormattedValue) and node.conversion == ord("r"):
            name = ast.unparse(node.value)
            assert name.isupper(), f"line {node.lineno}: {name} is no constant: use quoted"


def test_what_is_long_is_cut_and_says_so() -> None:
    assert shown("short") == "short"
    assert quoted("short") == "'short'"
    assert shown(HUGE) == f"{'x' * 120}... (1,000,000 characters)"
    assert len(quoted([HUGE])) < 160


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: LighthouseConfig(selection=HUGE),
        lambda: LighthouseCallback(switch_at=HUGE),
        lambda: LighthouseCallback(layer_types=[HUGE]),
        lambda: LighthouseCallback(dense_layers=HUGE),
        lambda: LighthouseRecipe(seq_len=8, source="x", output_dir="y", documents=HUGE),
        lambda: LighthouseRecipe(seq_len=8, sources=HUGE, output_dir="y"),
        lambda: patch_attention(Decoder(preset="toy", vocab_size=7), select=HUGE),
    ],
    ids=["selection", "switch_at", "layer_types", "dense_layers", "documents", "sources", "select"],
)
def test_a_huge_value_makes_a_short_line(mistake) -> None:
    with pytest.raises((TypeError, ValueError)) as refused:
        mistake()
    assert len(str(refused.value)) < 1_000
    assert "characters)" in str(refused.value)
