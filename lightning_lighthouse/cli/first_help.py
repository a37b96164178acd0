"""The first screen of `lighthouse fit --help`: the options that people set. `--help.all` shows every one.

The defaults stand here in words of their own, so that the screen appears at once: the parser that knows them takes
seconds to build. A test compares the two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning_lighthouse.cli.recipe import HELP_ALL


class Option(NamedTuple):
    """One line of the screen.

    Args:
        key: As it is given.
        text: What it sets.
        default: The parser's.
        shown: The default in words; None: as it is in a recipe.
        commands: Where it is of use.
    """

    key: str
    text: str
    default: Any = None
    shown: str | None = None
    commands: tuple[str, ...] = ("fit", "validate", "test")


FIT = ("fit",)
OPTIONS = (
    Option("lighthouse.switch_at", "when to switch to dense: a share of the steps, or a step", None, "0.9", FIT),
    Option("lighthouse.attention.selection", "how: causal, published, strided or random", "causal", commands=FIT),
    Option("lighthouse.attention.top_k", "winners at each level", None, "tokens / 64, at least 32", FIT),
    Option("lighthouse.dense_layers", "layers that are always dense: [0, -1], or published", None, "none", FIT),
    Option("lighthouse.enabled", "false trains the dense baseline", True, "true", FIT),
    Option("model.preset", "toy, small, base or paper: 0.9M, 41M, 114M or 268M parameters", "toy"),
    Option("model.learning_rate", "peak learning rate", 2e-3, commands=FIT),
    Option("model.compile", "true compiles the model, worth it on a GPU", False, "false"),
    Option("data.source", "text: a file, a folder or a pattern", None, "Python's own source"),
    Option("data.test_source", "text to test on, like source", None, "none", ("test",)),
    Option("data.seq_len", "tokens of a sequence", 8192),
    Option("data.batch_size", "sequences of a batch, on each device", 1),
    Option("data.tokenizer", "bytes, or a tokenizer.json", "bytes"),
    Option("data.output_dir", "where prepared data goes, and is found again", "data/prepared"),
    Option("trainer.max_steps", "optimizer steps", -1, "no limit", FIT),
    Option("trainer.devices", "how many GPUs or processes, or which", "auto"),
    Option("trainer.precision", "32-true, or bf16-mixed and the like", None, "32-true"),
    Option("trainer.val_check_interval", "batches from one validation to the next", None, "an epoch", FIT),
    Option("trainer.limit_val_batches", "batches that are looked at", None, "all", ("validate",)),
    Option("trainer.limit_test_batches", "batches that are looked at", None, "all", ("test",)),
)
CHECKPOINT = {
    "fit": "go on from a checkpoint: FILE, last, best, or auto: last, if there is one",
    "validate": "weights: a checkpoint or final.pt, last, best",
    "test": "weights: a checkpoint or final.pt, last, best",
}


def first_help(command: str) -> str:
    """The screen of "fit", "validate" or "test"."""
    lines = [
        ("-c RECIPE.yaml", "settings, needed; of several the later win, and flags win over all"),
        ("--ckpt_path FILE", CHECKPOINT[command]),
        ("--print_config", "print every setting as a recipe, and do nothing else"),
    ]
    for option in OPTIONS:
        if command in option.commands:
            shown = option.default if option.shown is None else option.shown
            lines.append((f"--{option.key}", f"{option.text} (default: {shown})"))
    width = max(len(key) for key, _ in lines)
    options = "\n".join(f"  {key:<{width}}  {text}" for key, text in lines)
    return (
        f"usage: lighthouse {command} -c RECIPE.yaml [-c MORE.yaml ...] [--KEY VALUE ...]\n\n"
        f"{options}\n\n"
        f"Every option: lighthouse {command} {HELP_ALL}. Those of a class: --model.help CLASS_PATH, --data.help "
        "CLASS_PATH.\nRecipes that ship: lighthouse recipes."
    )
