"""`lighthouse verify`: hash a prepared folder again."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_lighthouse.cli.parser import Parser
from lightning_lighthouse.data.integrity import verify
from lightning_lighthouse.data.manifest import Manifest


def main(argv: list[str] | None = None) -> int:
    """`lighthouse verify`: hash a prepared folder again.

    Returns:
        Exit status: 0 if all is well, 1 if a file is missing or altered, 2 for wrong arguments.
    """
    parser = Parser(prog="lighthouse verify", description="Compare a prepared folder with its manifest.")
    parser.add_argument("folder", type=Path, help="a folder written by lighthouse prepare")
    folder = parser.parse_args(argv).folder
    try:
        problems = list(verify(folder))
        for problem in problems:
            print(f"lighthouse verify: {problem}", file=sys.stderr)
        if problems:
            return 1
        print(f"{folder}: {len(Manifest.load(folder).files)} files as prepared, {Manifest.load(folder).summary()}")
    except (ValueError, OSError) as error:
        print(f"lighthouse verify: {error}", file=sys.stderr)
        return 1
    return 0
