"""The command `lighthouse`, a file a command; the commands are imported when they run."""

from lightning_lighthouse.cli.commands import main

__all__ = ["main"]
