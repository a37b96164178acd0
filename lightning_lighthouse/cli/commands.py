"""The command `lighthouse`: which command runs, and what its exit status says.

0: the run did what was asked. 2: arguments or a recipe are wrong, found before any training step. 1: data, checkpoints
and every other error while running. 130 and 143: stopped by SIGINT or SIGTERM. Lightning is imported only by the
commands that train, so that the others answer at once.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO

from lightning_lighthouse.checks import quoted
from lightning_lighthouse.cli.first_help import first_help
from lightning_lighthouse.cli.recipe import TRUSTED_ONLY, UsageError, nearest
from lightning_lighthouse.cli.recipes import require_recipe

_show_as_before = warnings.showwarning
DONE, FAILED, MISUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 128 + 2, 128 + 15

COMMANDS = {
    "fit": "Train a model with Lighthouse Attention, then dense: -c RECIPE.yaml [--KEY VALUE ...].",
    "validate": "Evaluate a checkpoint or final.pt on the validation data: -c RECIPE.yaml --ckpt_path FILE|last|best.",
    "test": "Evaluate a checkpoint or final.pt on the test data: -c RECIPE.yaml --ckpt_path FILE|last|best.",
    "recipes": "List the recipes that ship, or write one out: NAME > my.yaml.",
    "check": "Say everything that is wrong with a recipe, without training: RECIPE.yaml [--KEY VALUE ...].",
    "plan": "Say what a recipe will take before it trains, in time and memory: RECIPE.yaml [--card NAME | --probe].",
    "prepare": "Turn documents into packed tokens for training.",
    "verify": "Compare prepared data with its manifest.",
    "bench": "Measure Lighthouse and dense attention on this machine.",
    "evaluate": "Measure what a model can do with long context: RUN_FOLDER | CHECKPOINT | MODEL_FOLDER | MODEL.gguf.",
    "export": "Write a trained model as a folder of transformers: RUN|CHECKPOINT|final.pt OUT.",
    "generate": "Let a trained model go on with a text: RUN|FOLDER --prompt TEXT.",
    "compare": "Show runs side by side: seconds, speed, dense validation losses: RUN_FOLDER [...].",
}
# Commands with a main of their own, which returns the exit status
PROGRAMS = {
    "recipes": "lightning_lighthouse.cli.recipes",
    "plan": "lightning_lighthouse.cli.plan",
    "prepare": "lightning_lighthouse.cli.prepare",
    "verify": "lightning_lighthouse.cli.verify",
    "bench": "lightning_lighthouse.cli.bench",
    "evaluate": "lightning_lighthouse.cli.evaluate",
    "compare": "lightning_lighthouse.cli.compare",
    "export": "lightning_lighthouse.cli.export",
    "generate": "lightning_lighthouse.cli.generate",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; None: those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("LIGHTHOUSE_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    if _is_launched():
        _end_with_parent()
    warnings.showwarning = _show_warning
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        return _status(stop)
    except Exception as error:
        if type(error).__name__ == "NonFiniteError" and _is_launched():
            # the main process says the same, and has its status; see _status
            return DONE
        lines, status = _explain(error)
        if debug or not lines:
            traceback.print_exception(error)
        for line in lines:
            print(f"lighthouse: {line}", file=sys.stderr)
        return status


def _run(arguments: list[str]) -> int:
    if not arguments:
        return _refuse(f"a command is required: {', '.join(COMMANDS)}; see lighthouse --help")
    command, *rest = arguments
    if command in ("-h", "--help"):
        print(_help())
        return DONE
    if command == "--version":
        from lightning_lighthouse import __version__

        print(__version__)
        return DONE
    if command.startswith("-"):
        return _refuse(f"{command} comes before the command; write lighthouse fit {command} ...")
    if command not in COMMANDS:
        hint = nearest(command, list(COMMANDS))
        return _refuse(f"{quoted(command)} is not a command; allowed: {', '.join(COMMANDS)}{hint}")
    if command in PROGRAMS:
        return int(import_module(PROGRAMS[command]).main(rest))
    if TRUSTED_ONLY not in rest and "" not in sys.path:
        # a recipe may name a module of the current folder; at the end, so that it hides no package
        sys.path.append("")
    if command == "check":
        from lightning_lighthouse.cli.check import check

        return check(rest)
    if {"-h", "--help"} & set(rest):
        print(first_help(command))
        return DONE
    require_recipe(command, rest)
    # Lightning takes seconds to import
    from lightning_lighthouse.cli.fit import run

    return run(command, rest)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings on one line, without the place in the code that gives them; others as before."""
    # by name, for its module takes a second to import
    if category.__name__ == "LighthouseWarning":
        print(f"Lighthouse: {str(message).removeprefix('Lighthouse: ')}", file=sys.stderr)
    else:
        _show_as_before(message, category, filename, lineno, file, line)


def _refuse(problem: str) -> int:
    print(f"lighthouse: {problem}", file=sys.stderr)
    return MISUSED


def _help() -> str:
    commands = "\n".join(f"  {name:<9} {line}" for name, line in COMMANDS.items())
    return (
        "usage: lighthouse COMMAND [...]\n\n"
        f"Pre-train with Lighthouse Attention.\n\ncommands:\n{commands}\n\n"
        "Several recipes can be layered, -c BASE.yaml -c MORE.yaml: later ones win, and flags win over all.\n"
        "lighthouse COMMAND --help shows what a command takes, lighthouse fit --help.all every option, lighthouse fit\n"
        "--model.help CLASS_PATH what a class takes, and lighthouse fit ... --print_config what a run would use.\n"
        "--trusted_classes_only refuses recipes that name classes of other packages than this one and Lightning.\n"
        "--debug, or LIGHTHOUSE_DEBUG=1, shows where an error comes from."
    )


def _status(stop: SystemExit) -> int:
    """The exit status of a SystemExit; Lightning hides signals in it."""
    if type(stop).__name__ == "SIGTERMException":
        # Lightning kills the main process, maybe while it saves, once a rank that it launched ends with another status
        return DONE if _is_launched() else int(stop.code or TERMINATED)
    if isinstance(stop.__context__, KeyboardInterrupt):
        return INTERRUPTED
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or DONE
    print(f"lighthouse: {stop.code}", file=sys.stderr)
    return FAILED


def _is_launched() -> bool:
    """Whether Lightning started this process, for another rank of the main one."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ


def _end_with_parent() -> None:
    """End this rank soon after the main process, which may be killed while this one waits for it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(FAILED)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _explain(error: Exception) -> tuple[Sequence[str], int]:
    """The lines and the exit status for an error; no lines for one that only its traceback explains."""
    from lightning_lighthouse.checks import SettingError

    if isinstance(error, UsageError):
        return error.problems, MISUSED
    line = " ".join(str(error).split())
    if isinstance(error, SettingError):
        return [line], MISUSED
    if isinstance(error, OSError) or type(error).__name__ == "MisconfigurationException" or _ours(error):
        return [line], FAILED
    return [], FAILED


def _ours(error: Exception) -> bool:
    """Whether this package, or Lightning, raised the error itself, and so says in it what the user can do."""
    if type(error).__module__.startswith("lightning_lighthouse."):
        # a worker's error is raised a second time by torch
        return True
    if not isinstance(error, (ValueError, TypeError, RuntimeError, ModuleNotFoundError)):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    where = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    # Lightning's own ValueErrors are sentences about a setting
    is_lightnings = isinstance(error, ValueError) and where.startswith("lightning.pytorch.")
    return is_lightnings or where.startswith("lightning_lighthouse.")
