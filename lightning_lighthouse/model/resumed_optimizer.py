"""What a resumed run's optimizer keeps of its checkpoint, told where the settings say something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_lighthouse.checks import LighthouseWarning

# of a parameter group, and as the settings call it; `lr` itself has the schedule's factor in it
SETTINGS = {"initial_lr": "learning_rate", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}


def tell_kept_settings(optimizer: Optimizer, is_resuming: Callable[[], bool]) -> None:
    """Warn once where a state is loaded whose settings are not those of the optimizer, for they take their place.

    Args:
        optimizer: Of the settings; what a derived class changes about it until the state is loaded counts too.
        is_resuming: Whether a run goes on; finders of rates load states as well, whose rates differ by design.
    """
    is_told = False

    def before_load(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        nonlocal is_told
        changes = _changes(optimizer.param_groups, state["param_groups"]) if is_resuming() and not is_told else {}
        if changes:
            is_told = True
            kept = ", ".join(f"{name}={kept}" for name, (kept, _) in changes.items())
            asked = ", ".join(f"{name}={asked}" for name, (_, asked) in changes.items())
            rank_zero_warn(
                f"Lighthouse: the run goes on with {kept} of its checkpoint, though the settings now say {asked}; "
                "for these, begin a new run from the checkpoint's weights (docs/use/reliability.md)",
                category=LighthouseWarning,
            )

    optimizer.register_load_state_dict_pre_hook(before_load)


def _changes(asked: list[dict[str, Any]], kept: list[dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """By the name of each setting that differs: what the checkpoint has, and what the settings say."""
    changes: dict[str, tuple[Any, Any]] = {}
    # groups of another number are refused by torch itself
    for new, old in zip(asked, kept, strict=False):
        for key, name in SETTINGS.items():
            if key in new and key in old and not _is_same(old[key], new[key]):
                changes.setdefault(name, (_plain(old[key]), _plain(new[key])))
    return changes


def _plain(value: Any) -> float | tuple[float, ...]:
    """Numbers, also where they are kept in tensors or lists."""
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else float(value)


def _is_same(one: Any, other: Any) -> bool:
    """But for the rounding of a file of text, or of a tensor in float32."""
    first, second = (value if isinstance(value, tuple) else (value,) for value in (_plain(one), _plain(other)))
    return len(first) == len(second) and all(map(lambda a, b: math.isclose(a, b, rel_tol=1e-6), first, second))
