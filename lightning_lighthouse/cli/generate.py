"""`lighthouse generate`: what a trained model says to a prompt."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.cli.parser import DTYPES, Parser


def main(argv: list[str] | None = None) -> int:
    """Run `lighthouse generate`.

    Returns:
        Exit status: 0 when it was written, 1 where there is no such model, 2 for wrong arguments.
    """
    parser = Parser(prog="lighthouse generate", description="Let a trained model go on with a prompt.")
    parser.add_argument("trained", type=Path, help="what lighthouse export takes, or a folder that it wrote")
    parser.add_argument("--prompt", help="the text to go on with")
    parser.add_argument("--prompt_file", type=Path, help="a file with it, as long as the model's context")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens to write at most (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample among this share of the mass (default: 1)")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling (default: 42)")
    parser.add_argument("--dtype", choices=DTYPES, help="to run in (default: that of the weights; 16 bits on a GPU)")
    parser.add_argument("-c", "--recipe", type=Path, help="the run's recipe (default: config.yaml beside the weights)")
    asked = parser.parse_args(argv)
    if (asked.prompt is None) == (asked.prompt_file is None):
        parser.error("give one of --prompt and --prompt_file")
    if asked.prompt == "":
        parser.error("--prompt must hold at least one token, got ''")
    if asked.max_new_tokens < 1:
        parser.error(f"--max_new_tokens must be at least 1, got {asked.max_new_tokens}")
    if not 0 <= asked.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2^63 - 1, got {asked.seed}")
    if asked.temperature < 0 or not 0 < asked.top_p <= 1:
        parser.error(f"--temperature must be at least 0 and --top_p in (0, 1], got {asked.temperature}, {asked.top_p}")
    # transformers takes seconds to import
    import torch

    from lightning_lighthouse.huggingface.generation import go_on
    from lightning_lighthouse.huggingface.trained import load_trained

    dtype = asked.dtype and getattr(torch, asked.dtype)
    try:
        prompt = asked.prompt if asked.prompt_file is None else asked.prompt_file.read_text()
        trained = load_trained(asked.trained, asked.recipe)
    except (ValueError, OSError, RuntimeError) as error:
        return _refused(error, 1)
    try:
        text = go_on(trained, prompt, asked.max_new_tokens, asked.temperature, asked.top_p, asked.seed, dtype)
    except (ValueError, OSError, RuntimeError) as error:
        # a prompt that the model cannot take is the arguments' fault
        return _refused(error, 2 if isinstance(error, SettingError) else 1)
    print(text)
    return 0


def _refused(error: Exception, status: int) -> int:
    print(f"lighthouse generate: {' '.join(str(error).split())}", file=sys.stderr)
    return status
