"""Arguments of the commands that have a parser of their own."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

# names that torch has, of what --dtype takes
DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, and ends with status 2. Abbreviations are off."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse; an option that does not exist is named before one that is missing."""
        arguments = sys.argv[1:] if args is None else args
        if problem := unknown_option(arguments, self._option_string_actions):
            self.error(problem)
        return super().parse_args(arguments, namespace)

    def error(self, message: str) -> NoReturn:
        """Print `message` alone, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def unknown_option(arguments: Sequence[str], options: Iterable[str]) -> str:
    """What is wrong with the first argument that names no option, with the nearest one; nothing if all are known."""
    known = [option for option in options if option.startswith("--")]
    for argument in arguments:
        option = argument.partition("=")[0]
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; allowed: {', '.join(known)}"
            return f"{option} is not an option{hint}"
    return ""
