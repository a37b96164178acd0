"""`lighthouse prepare`: pack text for training."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from typing import Any

from lightning_lighthouse.cli.parser import Parser
from lightning_lighthouse.data.preparing.prepare import check_workers, prepare
from lightning_lighthouse.data.settings import (
    BYTES,
    PACK,
    WHOLE,
    Settings,
    WeightedSource,
    weighted_sources,
)

# Arguments of `prepare` that are no settings
FOLDER_ARGUMENTS = ("output_dir", "num_workers", "overwrite")


def _settings(asked: dict[str, Any]) -> Settings:
    return Settings(**{**asked, "sources": weighted_sources(asked["sources"])})


def _weighted_source(text: str) -> WeightedSource:
    path, equals, weight = text.rpartition("=")
    try:
        return WeightedSource(path, float(weight)) if equals else WeightedSource(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} must be PATH=WEIGHT: {error}") from None


def main(argv: list[str] | None = None) -> int:
    """`lighthouse prepare`: pack text for training.

    Returns:
        Exit status: 0 when the folder is complete, 1 for the data, 2 for wrong arguments.
    """
    parser = Parser(
        prog="lighthouse prepare",
        description="Pack documents into sequences of tokens. The options are those of LighthouseRecipe.",
    )
    parser.add_argument("--output_dir", required=True, help="folder to write, complete or not at all")
    parser.add_argument("--seq_len", type=int, required=True, help="tokens of a sequence")
    parser.add_argument("--source", help="file, folder or glob pattern (default: Python's standard library)")
    parser.add_argument(
        "--sources",
        type=_weighted_source,
        nargs="+",
        metavar="PATH=WEIGHT",
        help="several sources and their shares, instead of --source",
    )
    parser.add_argument("--text_field", default="text", help="field of JSONL and tables (default: %(default)s)")
    parser.add_argument("--tokenizer", default=BYTES, help="bytes, or a tokenizer.json (default: %(default)s)")
    parser.add_argument("--end_of_document", help="token that ends a document (default: the usual one)")
    parser.add_argument("--validation_source", help="where validation documents come from (default: the source)")
    parser.add_argument(
        "--validation_fraction", type=float, default=0.05, help="share of the documents (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the choice of those (default: %(default)s)")
    parser.add_argument("--test_source", help="where test documents come from (default: no test data)")
    parser.add_argument(
        "--documents", default=PACK, help=f"{PACK}, or {WHOLE}: long ones begin a sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--long_fraction", type=float, help="share of the sequences that begin with a long one (default: as they come)"
    )
    parser.add_argument("--num_workers", type=int, default=0, help="processes that tokenize (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder prepared with other settings")
    asked = parser.parse_args(argv)
    try:
        check_workers(asked.num_workers)
        _settings({name: value for name, value in vars(asked).items() if name not in FOLDER_ARGUMENTS})
    except ValueError as error:
        parser.error(str(error))
    try:
        manifest = prepare(**vars(asked))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"lighthouse prepare: {error}", file=sys.stderr)
        return 1
    print(f"{asked.output_dir}\n{manifest.report()}")
    return 0
