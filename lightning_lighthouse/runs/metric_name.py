"""Under which name a model logs its validation loss."""

from __future__ import annotations

from collections.abc import Collection

from lightning_lighthouse.notices import log_once

# the name of this package's own model, and the commonest one of others
DEFAULT, COMMON = "val/loss", "val_loss"


def metric_name(asked: str, logged: Collection[str]) -> str:
    """The name to look up: `asked`, or "val_loss" where the default was not logged and that was; which is said once.

    Args:
        asked: The setting.
        logged: The names that there are.
    """
    if asked != DEFAULT or DEFAULT in logged or COMMON not in logged:
        return asked
    log_once(COMMON, f"{DEFAULT} was not logged, {COMMON} was: it is taken as the validation loss")
    return COMMON


def metric_names(asked: str) -> list[str]:
    """Every name that `metric_name` may give."""
    return [DEFAULT, COMMON] if asked == DEFAULT else [asked]
