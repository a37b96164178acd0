"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_lighthouse"
TESTS = ROOT / "tests"
HELPERS = TESTS / "helpers"
GOLDEN = TESTS / "golden"
DOCS = ROOT / "docs"
RECIPES = ROOT / "recipes"
