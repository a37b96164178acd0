"""Arguments of the commands that have a parser of their own: prepare, verify, bench."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, and ends with status 2. Abbreviations are off."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse; an option that does not exist is named before one that is missing."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for argument in sys.argv[1:] if args is None else args:
            option = argument.partition("=")[0]
            if option.startswith("--") and option not in known:
                near = difflib.get_close_matches(option, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; allowed: {', '.join(known)}"
                self.error(f"{option} is not an option{hint}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print `message` alone, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")
