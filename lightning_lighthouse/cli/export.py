"""`lighthouse export`: a trained model as a folder of transformers."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_lighthouse.cli.parser import DTYPES, Parser


def main(argv: list[str] | None = None) -> int:
    """Run `lighthouse export`.

    Returns:
        Exit status: 0 when the folder is there, 1 where there is nothing to export or no room, 2 for wrong arguments.
    """
    parser = Parser(
        prog="lighthouse export",
        description="Write a trained model as a folder that transformers loads without this package.",
    )
    parser.add_argument(
        "trained", type=Path, help="folder of a run, checkpoint, sharded checkpoint, final.pt, or .gguf file"
    )
    parser.add_argument("out", type=Path, help="the folder to write; must not exist, or be empty")
    parser.add_argument("-c", "--recipe", type=Path, help="the run's recipe (default: config.yaml beside the weights)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as is)")
    asked = parser.parse_args(argv)
    # transformers takes seconds to import
    import torch

    from lightning_lighthouse.huggingface.export import export
    from lightning_lighthouse.huggingface.trained import load_trained

    try:
        trained = load_trained(asked.trained, asked.recipe)
        folder = export(trained, asked.out, asked.dtype and getattr(torch, asked.dtype))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"lighthouse export: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if trained.tokenizer is None:
        print("lighthouse export: no tokenizer is known, and none was written", file=sys.stderr)
    print(f"{folder}: {type(trained.model).__name__}, from {trained.weights}")
    return 0
