"""`lighthouse prepare`: pack text for training."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_lighthouse.checks import quoted
from lightning_lighthouse.cli.options import OptionsParser
from lightning_lighthouse.data.preparing.prepare import prepare
from lightning_lighthouse.data.settings import Preparation, WeightedSource


def _weighted_source(text: str) -> WeightedSource:
    path, equals, weight = text.rpartition("=")
    # "lang=en/*.txt" too is a path: no weight holds a slash
    if Path(text).exists() or "/" in weight:
        return WeightedSource(text)
    try:
        return WeightedSource(path, float(weight)) if equals else WeightedSource(text)
    except ValueError as error:
        raise ValueError(f"argument --sources: {quoted(text)} must be PATH=WEIGHT: {error}") from None


def main(argv: list[str] | None = None) -> int:
    """`lighthouse prepare`: pack text for training.

    Returns:
        Exit status: 0 when the folder is complete, 1 for the data, 2 for wrong arguments.
    """
    parser = OptionsParser(
        prog="lighthouse prepare",
        description="Pack documents into sequences of tokens. The options are those of LighthouseRecipe.",
    )
    # a list of records is JSON on a command line, which nobody likes to type
    parser.add_class_arguments(Preparation, as_group=False, skip={"sources"})
    parser.add_argument(
        "--sources",
        type=str,
        nargs="+",
        metavar="PATH=WEIGHT",
        help="Several sources and their shares, instead of --source.",
    )
    asked = vars(parser.parse_args(argv))
    try:
        asked["sources"] = asked["sources"] and [_weighted_source(text) for text in asked["sources"]]
        Preparation(**asked)
    except ValueError as error:
        parser.error(str(error))
    try:
        manifest = prepare(**asked)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"lighthouse prepare: {error}", file=sys.stderr)
        return 1
    print(f"{asked['output_dir']}\n{manifest.report()}")
    return 0
