"""A parser of options that a dataclass lists once: names, types, defaults and help come from there."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lightning_lighthouse.cli.parser import unknown_option
from lightning_lighthouse.cli.recipe import Raw
from lightning_lighthouse.cli.recipe_check import refusal

# How jsonargparse says that a value does not fit
WRONG_VALUE = re.compile(r'Parser key "(?P<key>\w+)":.*Got value: (?P<value>.*)', re.DOTALL)
# and that some are missing
MISSING = "the following arguments are required: "


class OptionsParser(ArgumentParser):
    """jsonargparse's parser, which says what is wrong in one line, and ends with status 2. Abbreviations are off."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:  # type: ignore[override]
        """Parse; an option that does not exist is named before one that is missing; a yes or no needs no value."""
        arguments = sys.argv[1:] if args is None else list(args)
        if problem := unknown_option(arguments, self._option_string_actions):
            self.error(problem)
        switches = {f"--{name}" for name, hint in self._hints().items() if hint is bool}
        arguments = [f"{item}=true" if item in switches else item for item in arguments]
        return super().parse_args(arguments, *others, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line, without the usage."""
        if wrong := WRONG_VALUE.search(message):
            message = f"{wrong['key']} {refusal(Raw(wrong['value']), self._hints()[wrong['key']])}"
        elif message.startswith(MISSING):
            names = message.removeprefix(MISSING).split(", ")
            message = MISSING + ", ".join(f"--{name.removeprefix('--')}" for name in names)
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def _hints(self) -> dict[str, Any]:
        """The type of each option's value."""
        return {action.dest: getattr(action, "_typehint", action.type) for action in self._actions}
